"""Public experts that recipes name, imported once: a folder of files under the hash of their bytes, and what they are.

`<key>.json` says which file a name became, and of which commit of its repository; as long as it is there the name
means that file, with or without a network. Removing it fetches anew.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ca2st.durable import write_bytes
from ca2st.errors import EnvironmentFault
from ca2st.model.config import EncoderName
from ca2st.weights.errors import WeightsDamageError
from ca2st.weights.hub import HubAccess, fetch
from ca2st.weights.importer import ImportOptions, import_weights
from ca2st.weights.sizes import UnwrittenSizes


@dataclass(frozen=True, slots=True)
class ImportedExperts:
    """A folder of imported experts."""

    folder: Path
    """Usually `imported` beside the runs; made when the first name is imported."""

    def get(self, name: str, encoder: EncoderName, sizes: UnwrittenSizes, access: HubAccess) -> Path:
        """The file of the public checkpoint `name`, fetched and imported the first time it is asked for.

        Raises:
            UserInputError: an unknown name, or weights that are not of this encoder.
            EnvironmentFault: the hub cannot be reached, or the folder not be written.
            WeightsDamageError: a kept file is not what was written.
        """
        told = {"source": name, "encoder": encoder, "sizes": asdict(sizes)}
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        note = self.folder / f"{key}.json"
        if note.is_file() and (kept := self._kept(note)).is_file():
            return kept
        return self._import(name, encoder, sizes, access, note)

    def _kept(self, note: Path) -> Path:
        try:
            sha256: str = json.loads(note.read_text())["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsDamageError(f"{note}: cannot read it ({error!r}); remove it to import anew") from error
        path = self.folder / f"{sha256}.safetensors"
        if path.is_file():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise WeightsDamageError(f"{path}: expected that sha256, found {found}; remove it to import anew")
        return path

    def _import(self, name: str, encoder: EncoderName, sizes: UnwrittenSizes, access: HubAccess, note: Path) -> Path:
        fetched = fetch(name, access)
        new = self.folder / f".{note.stem}.{os.getpid()}.safetensors"
        options = ImportOptions(sizes=sizes, origin=fetched.origin)
        report = import_weights(fetched.path, new, kind=encoder, options=options)
        path = self.folder / f"{report.sha256}.safetensors"
        try:
            new.replace(path)
        except OSError as error:
            raise EnvironmentFault(f"cannot write {path}: {error.strerror}; check the folder") from error
        facts = {"encoder": encoder, "sha256": report.sha256, "source_sha256": report.source_sha256}
        document = {**asdict(fetched.origin), **facts}
        write_bytes(note, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
        return path
