"""Templates of a page: those of its own package, and the layout and style that all pages share."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

_FOLDER = "page_files"


def page_environment(package: str) -> Environment:
    """The templates in `page_files` of `package`, beside the shared ``layout.html``, which a page extends.

    Whatever is filled in is escaped, and what is not given is an error.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, _FOLDER), PackageLoader("ray_jobs.pages", _FOLDER)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
