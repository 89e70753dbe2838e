"""Names that every reader takes: ASCII, without spaces."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import warnings
from collections.abc import Iterable

from dualdiff_engine.errors import SettingsError

# where the formats put normal pictures
GOOD = "good"


def slug(name: str) -> str:
    """A name in ASCII letters, digits and `_`; accents are dropped.

    Dots would end the key of a WebDataset sample. `-` is what `joined` puts between names, and
    sorts before `/`: anomalib would pair the masks of LOCO's `a` with the images of `a-b`.
    Names that nothing is left of get a hash: the same name has the same slug in every run.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    text = re.sub(r"[^A-Za-z0-9_]+", "_", plain).strip("_")[:100]
    return text or "n" + hashlib.sha256(name.encode()).hexdigest()[:8]


def joined(product: str, *parts: str) -> str:
    """Slugs as one name, unlike that of any others."""
    return "-".join((product, *parts))


def slugs(names: Iterable[str], what: str) -> dict[str, str]:
    """Name -> slug. Warns of names that change.

    Raises SettingsError when two names have one slug, also where only the case differs: there are
    file systems that know no case.
    """
    taken: dict[str, str] = {}
    found = {}
    for name in sorted(set(names)):
        short = slug(name)
        if (other := taken.setdefault(short.lower(), name)) != name:
            raise SettingsError(
                f"the {what}s {other!r} and {name!r} would both be called {short}: rename one"
            )
        if short != name:
            warnings.warn(f"{what} {name!r} is called {short} in the export", stacklevel=2)
        found[name] = short
    return found
