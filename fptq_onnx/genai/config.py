"""genai_config.json: what of it matters for the decoder model and its custom ops (onnxruntime-genai 0.18)."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fptq_onnx.errors import ModelError, why_unreadable

__all__ = ["CONFIG_NAME", "GenaiConfig"]

CONFIG_NAME = "genai_config.json"

_LIBRARY_KEY = "custom_ops_library"


@dataclass(frozen=True)
class GenaiConfig:
    """A parsed genai_config.json.

    Attributes:
        path: Where it was read from.
        data: The whole file; never changed.
    """

    path: Path
    data: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> GenaiConfig:
        """Read the configuration of a model folder.

        Raises:
            ModelError: It is missing, no JSON, or has no single decoder model in the folder (a pipeline of several).
        """
        path = folder / CONFIG_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(
                str(folder),
                f"holds no {CONFIG_NAME}, so it is no model folder of onnxruntime-genai",
                "Give the .onnx file itself, or a folder made by onnxruntime-genai's model builder",
            ) from None
        except OSError as error:
            raise ModelError(str(path), why_unreadable(error), "Check the permissions") from error
        except ValueError as error:
            raise ModelError(str(path), f"is not JSON ({error})", "Build the model folder again") from error
        config = cls(path, data)
        decoder = config._decoder()
        if not isinstance(decoder.get("filename"), str) or not decoder["filename"]:
            several = "its decoder is a pipeline of several models" if "pipeline" in decoder else "it names no decoder"
            raise ModelError(str(path), several, "Convert the .onnx files one by one")
        inside = Path(decoder["filename"])
        if inside.is_absolute() or ".." in inside.parts:
            raise ModelError(str(path), f"names the decoder {inside}, outside the folder", "Move the file into it")
        if not isinstance(decoder.get("session_options") or {}, dict):
            raise ModelError(str(path), "session_options of its decoder is no object", "Build the model folder again")
        return config

    @property
    def filename(self) -> str:
        """The decoder's ONNX file, relative to the folder."""
        return str(self._decoder()["filename"])

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Token ids that end a text."""
        ids = self.data["model"].get("eos_token_id")
        return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])

    @property
    def library(self) -> str | None:
        """The custom-op library that the decoder's session registers, if any."""
        library = (self._decoder().get("session_options") or {}).get(_LIBRARY_KEY)
        return None if library is None else str(library)

    def with_library(self, file_name: str) -> GenaiConfig:
        """Return a configuration whose decoder session registers `file_name`, a file of the model folder."""
        data = copy.deepcopy(self.data)
        decoder = data["model"]["decoder"]
        decoder["session_options"] = (decoder.get("session_options") or {}) | {_LIBRARY_KEY: file_name}
        return GenaiConfig(self.path, data)

    def save(self, folder: Path) -> None:
        """Write the file, in the builder's layout."""
        (folder / CONFIG_NAME).write_text(json.dumps(self.data, indent=4), encoding="utf-8")

    def _decoder(self) -> dict[str, Any]:
        model = self.data.get("model") if isinstance(self.data, dict) else None
        decoder = model.get("decoder") if isinstance(model, dict) else None
        if not isinstance(decoder, dict):
            raise ModelError(str(self.path), "has no section model.decoder", "Build the model folder again")
        return decoder
