"""fastclip as a kernel of the Hugging Face Hub: its layers, and the builder of the repository.

`python -m fastclip.hub_kernel FOLDER` builds it from a checkout. Installations leave this package
out.
"""
