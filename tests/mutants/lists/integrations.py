"""Mutants of the program that patches hosts, and of what every integration uses."""

from mutants.mutant import mutant

PATCH = "tests/integrations/test_patch.py::test_"
ON_IMPORT = "fastclip/integrations/on_import.py"
REPLACEMENTS = "fastclip/integrations/replacements.py"

MUTANTS = (
    mutant(
        "a search ends the wait for an import",
        ON_IMPORT, "name not in _waiting or name in self.asking",
        "not _waiting.pop(name, None) or name in self.asking",
        f"{PATCH}a_search_without_an_import",
    ),
    mutant(
        "a loader that modules share is changed",
        ON_IMPORT, "module.__spec__.loader = module.__loader__ = self.own", "pass",
        f"{PATCH}a_search_without_an_import",
    ),
    mutant(
        "a module that is imported again calls its function again",
        ON_IMPORT, "_waiting.pop(name, None):\n            call()",
        "_waiting.get(name):\n            call()",
        f"{PATCH}functions_of_modules",
    ),
    mutant(
        "a refused host is an ImportError that a script may catch",
        "fastclip/patch.py", "        sys.exit(f\"fastclip.patch: {error}; ",
        "        raise ImportError(f\"fastclip.patch: {error}; ",
        f"{PATCH}a_refused_host_ends_the_script",
    ),
    mutant(
        "every rank says what is patched",
        "fastclip/patch.py", "os.environ.get(\"RANK\", \"0\") == \"0\"", "True",
        f"{PATCH}only_the_first_rank_says_so",
    ),
    mutant(
        "a script finds modules beside the working directory only",
        "fastclip/patch.py", "os.path.dirname(os.path.realpath(script))", "\"nowhere\"",
        f"{PATCH}a_script_is_patched_when_it_imports_the_host[script.py]",
    ),
    mutant(
        "what somebody else has set is overwritten",
        REPLACEMENTS, "if _held(owner, name) is not value:", "if False:",
        f"{PATCH}what_others_have_set_stays",
    ),
    mutant(
        "a static method becomes a function",
        REPLACEMENTS, "else vars(owner).get(name, _ABSENT)",
        "else getattr(owner, name, _ABSENT)",
        f"{PATCH}static_methods_stay_static",
    ),
    mutant(
        "an alias keeps the host's class",
        REPLACEMENTS, "in _names_of(before):", "in _names_of(before)[:1]:",
        f"{PATCH}an_object_is_replaced_under_all_its_names",
    ),
    mutant(
        "a name that is imported while patched keeps fastclip's class",
        REPLACEMENTS, "in _names_of(value):", "in ():",
        f"{PATCH}an_object_is_replaced_under_all_its_names",
    ),
)  # fmt: skip
