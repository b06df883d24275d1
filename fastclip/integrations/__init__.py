"""fastclip in libraries that compute contrastive losses themselves, called hosts here.

Each module belongs to one host and imports it when it is used:

    from fastclip.integrations import open_clip
    open_clip.patch()    # open_clip's names are fastclip's classes from here on
    open_clip.unpatch()  # and its own again

`python -m fastclip.patch train.py ARGS` runs a script with its hosts patched. With
`FASTCLIP_DISABLE=1` nothing is patched.
"""

# The modules of this package with a `patch`, by the host that each imports.
HOSTS = {
    "open_clip": "open_clip",
    "sentence_transformers": "sentence_transformers",
    "transformers": "transformers",
    "lightly": "lightly",
    "pytorch_metric_learning": "metric_learning",
}
