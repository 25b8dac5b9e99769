"""The artifact: the directory that the compiler writes and the runtime loads. Standard library and numpy.

    manifest.json          schema version, target, config, buckets, pass log, tool versions, how weights are
                           given, the size and sha256 of every other file, and a digest of all that
    kernels/  ir/          machine code; the graph after each stage
    plans/<bucket>.json    launch plans; of ranks behind the first: <bucket>.rank<N>.json
    tokenizer/             o200k_base.tiktoken, unless the checkpoint has none
    weights/               *.safetensors (mode `files`)

Equal input gives a byte-identical artifact: nothing in it depends on time, place or order of iteration. An
artifact is verified in full before anything of it is used; what does not fit is refused by name with
ArtifactError.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.paths import Progress, atomic_directory, cache_dir, hash_files

SCHEMA = 4
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer/o200k_base.tiktoken"
# One weight of a plan: {"name", "dtype", "shape"} and either "parts" (logical weights, concatenated along
# axis 0), "values" (the numbers themselves) or neither (zeros). Beside parts may stand "cuts", one a part: {"axis",
# "start", "stop"}, what is taken of it. "largest", if given, is the largest value that may be stored.
Recipe = Mapping[str, Any]


class ArtifactError(ValueError):
    """An artifact that must not be used or cannot be written; the message names the file and the defect."""


@dataclass(frozen=True)
class Artifact:
    """An artifact that was verified when it was opened."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, target: str | None = None,
             progress: Progress | None = None) -> Artifact:
        """Verify the artifact at `path` and return it.

        The schema version is checked first, so that an artifact of a newer compiler is named as such; then
        the manifest against its own digest, the target (if one is asked for), and the size and sha256 of
        every file. Raises ArtifactError.
        """
        root = Path(path).resolve()
        if not root.is_dir():
            raise ArtifactError(f"{path} is not a directory; an artifact is what gptoss-compile -o writes")
        manifest = _read_manifest(root)
        if target is not None and manifest["target"] != target:
            raise ArtifactError(f"{root} was compiled for {manifest['target']}, not for {target}; compile it "
                                f"again with --target {target}")
        present = _list_files(root)
        present.discard(MANIFEST)
        _verify_files(root, manifest["files"], present, progress)
        artifact = cls(root, manifest)
        if artifact.weights == "link":
            _verify_pack(artifact._pack(), manifest["weights"]["files"], progress)
        return artifact

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_json(self.manifest["config"])

    @property
    def target(self) -> str:
        return str(self.manifest["target"])

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(Bucket(**bucket) for bucket in self.manifest["buckets"])

    @property
    def page_size(self) -> int:
        return int(self.manifest["page_size"])

    @property
    def max_context(self) -> int:
        return int(self.manifest["max_context"])

    @property
    def window_ring(self) -> int:
        """W, entries of a sequence's page table for sliding-window layers."""
        return int(self.manifest["window_ring"])

    @property
    def weights(self) -> str:
        """How weights are given: `files` (in weights/), `link` (a shared pack in the user's cache) or
        `random:SEED`.
        """
        section = self.manifest["weights"]
        return f"random:{section['seed']}" if section["mode"] == "random" else str(section["mode"])

    @property
    def ranks(self) -> int:
        return len(self.manifest["weights"]["recipes"])

    @property
    def has_tokenizer(self) -> bool:
        return TOKENIZER in self.manifest["files"]

    @property
    def tokenizer_note(self) -> str:
        """Where the tokenizer came from, or why there is none."""
        return str(self.manifest["tokenizer_note"])

    def recipes(self, rank: int = 0) -> list[dict[str, Any]]:
        return list(self.manifest["weights"]["recipes"][rank])

    def file(self, rel: str) -> Path:
        """The path of one of the artifact's files. Raises ArtifactError if it has no such file."""
        if rel not in self.manifest["files"]:
            raise ArtifactError(f"{self.path} has no file {rel}")
        return self.path / rel

    def plan(self, bucket: Bucket, rank: int = 0) -> dict[str, Any]:
        """A rank's launch plan of a bucket, as JSON."""
        plan: dict[str, Any] = json.loads(self.file(plan_file(bucket, rank)).read_bytes())
        return plan

    def open_weights(self, rank: int = 0) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """(recipe name, array) of each weight of a rank; see `gptoss_compile.weights.read_weights`."""
        from gptoss_compile.weights import read_weights  # needs the artifact's types, so not at the top

        return read_weights(self, rank)

    def weight_files(self, rank: int = 0) -> list[Path]:
        """The safetensors files of a rank's weights; none if they are random."""
        folder = self._pack() if self.weights == "link" else self.path / "weights"
        shards = self.manifest["weights"].get("shards")
        return [folder / name for name in shards[rank]] if shards else []

    def _pack(self) -> Path:
        return pack_directory(self.manifest["weights"]["pack"])


def rank_suffix(rank: int) -> str:
    """What stands behind the names of a rank's files; for the first nothing, so that one rank looks like none."""
    return f".rank{rank}" if rank else ""


def plan_file(bucket: Bucket, rank: int = 0) -> str:
    """The name of a rank's launch plan of a bucket in an artifact."""
    return f"plans/{bucket.name}{rank_suffix(rank)}.json"


def pack_directory(key: str) -> Path:
    """Where the shared pack of weights with this key lives."""
    return cache_dir() / "packs" / key


class ArtifactWriter:
    """Writes an artifact beside `path` and, when the `with` block ends well, puts it there, over an older
    artifact.

    On an exception nothing is left behind and an older artifact stays as it was.
    """

    def __init__(self, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
        self.path = Path(path)
        self._progress = progress
        self._fields: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ArtifactWriter:
        _refuse_to_replace(self.path)
        self._directory = self._stack.enter_context(atomic_directory(self.path))
        return self

    def describe(self, *, target: str, config: ModelConfig, buckets: Sequence[Bucket], page_size: int,
                 max_context: int, window_ring: int, passes: Sequence[Any], tools: Mapping[str, str],
                 tokenizer_note: str = "") -> None:
        """Set the manifest's facts. passes: the pass log (JSON values); tools: name -> version."""
        self._fields |= {
            "target": target, "config": config.to_json(), "buckets": [vars(bucket) for bucket in buckets],
            "page_size": page_size, "max_context": max_context, "window_ring": window_ring,
            "passes": list(passes), "tools": dict(tools), "tokenizer_note": tokenizer_note,
        }

    def set_weights(self, section: Mapping[str, Any]) -> None:
        """Say how weights are given; `gptoss_compile.pack` does."""
        self._fields["weights"] = dict(section)

    def write(self, rel: str, data: bytes) -> None:
        self.add_file(rel).write_bytes(data)

    def add_file(self, rel: str) -> Path:
        """The path at which to write the artifact's file `rel`; its folder exists."""
        parts = PurePosixPath(rel).parts
        assert rel == "/".join(parts) and ".." not in parts and parts[0] != "/" and rel != MANIFEST, rel
        path = self._directory / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with self._stack:  # hands the exception, the caller's or ours, to atomic_directory
            if error is not None:
                raise error
            self._finish()

    def _finish(self) -> None:
        assert {"target", "weights"} <= self._fields.keys(), "describe() and set_weights() come first"
        paths = {rel: self._directory / rel for rel in sorted(_list_files(self._directory))}
        hashes = hash_files(paths, self._progress)
        files = {rel: {"bytes": path.stat().st_size, "sha256": hashes[rel]} for rel, path in paths.items()}
        rest = json.loads(json.dumps({"schema": SCHEMA, **self._fields, "files": files}, allow_nan=False))
        (self._directory / MANIFEST).write_bytes(_encode({**rest, "digest": _digest(rest)}))


def canonical_json(value: Any) -> bytes:
    """One spelling for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json({k: v for k, v in manifest.items() if k != "digest"})).hexdigest()


def _encode(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.resolve().is_relative_to(root):
        raise ArtifactError(f"{MANIFEST} of {root} is a link that leaves the directory")
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
    except OSError as error:
        raise ArtifactError(f"{root} is no artifact: no {MANIFEST} can be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST} of {root} is damaged: {error}") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is int and schema != SCHEMA:
        age, cure = ("newer", "update gptoss-compile, or ") if schema > SCHEMA else ("older", "")
        raise ArtifactError(f"{root} has schema {schema}, {age} than the {SCHEMA} that this version reads; {cure}compile "
                            "the model again")
    # Every byte counts, white space too: the file must be exactly what the writer makes of its content.
    if schema != SCHEMA or manifest.get("digest") != _digest(manifest) or _encode(manifest) != data:
        raise ArtifactError(f"{MANIFEST} of {root} is damaged: it does not match its own digest")
    return dict(manifest)


def _list_files(root: Path) -> set[str]:
    """Every file under root, relative, with `/`. Raises ArtifactError for a link that leaves root and for
    anything that
    is neither file nor directory."""
    found = set()
    for folder, directories, names in os.walk(root):
        links = [name for name in directories if os.path.islink(os.path.join(folder, name))]
        for name in (*names, *links):
            path = Path(folder, name)
            rel = path.relative_to(root).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise ArtifactError(f"{rel} in {root} is a link that leaves the directory")
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):
                raise ArtifactError(f"{rel} in {root} is no plain file")
            found.add(rel)
    return found


def _verify_files(root: Path, listed: Mapping[str, Mapping[str, Any]], present: set[str],
                  progress: Progress | None) -> None:
    for rel in sorted(listed.keys() - present):
        raise ArtifactError(f"{rel} is missing from {root}")
    for rel in sorted(present - listed.keys()):
        raise ArtifactError(f"{rel} in {root} is not in its manifest: a file was added")
    for rel, entry in listed.items():
        path = root / rel
        size = path.stat().st_size if path.exists() else -1  # -1: a link to nothing
        if size != entry["bytes"]:
            raise ArtifactError(f"{rel} in {root} has {max(size, 0)} bytes instead of {entry['bytes']}: "
                                f"{'truncated' if size < entry['bytes'] else 'changed'}")
    for rel, digest in hash_files({rel: root / rel for rel in listed}, progress).items():
        if digest != listed[rel]["sha256"]:
            raise ArtifactError(f"{rel} in {root} is damaged: its sha256 is not the manifest's")


def _verify_pack(pack: Path, listed: Mapping[str, Mapping[str, Any]], progress: Progress | None) -> None:
    if not pack.is_dir():
        raise ArtifactError(f"the artifact links to a weight pack that is not here, {pack}; compile again on "
                            "this machine, or with --weights pack to store the weights in the artifact")
    try:
        _verify_files(pack, listed, _list_files(pack), progress)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; delete {pack} and compile again") from None


def _refuse_to_replace(path: Path) -> None:
    """An output path may be new, an empty directory or an artifact, so that a slip costs nobody their files.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise ArtifactError(f"{path} exists and is no directory; choose another output")
    if any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} exists and holds no artifact; choose another output, or remove it first")
