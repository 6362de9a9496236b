"""From what people call a model to the model. The hub is a stand-in here: nothing leaves the machine."""

import contextlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from make_tokenizer import build_tokenizer
from reference import make_inputs, randomize, tiny_config
from typer.testing import CliRunner

import paligemma.utils
from paligemma.cli.main import app
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.tokenizer import load_tokenizer
from paligemma.utils import load_hf_model, stored_dtype
from paligemma.weights.converting import convert, merge
from paligemma.weights.finding import resolve
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.saving import save_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint whose tokenizer and configuration agree."""
    folder = build_tokenizer(tmp_path_factory.mktemp("models") / "small")
    tokenizer = load_tokenizer(folder)
    model = PaliGemmaForConditionalGeneration(
        tiny_config("gemma", vocab_size=len(tokenizer), image_token_index=tokenizer.image_token_id)
    )
    randomize(model)
    save_pretrained(model, folder)
    return folder


@torch.no_grad()
def logits_of(model):
    return model(**make_inputs(model.config, prefix=[3])).logits


# ------------------------------------------------------------------------------------------------ on this machine


def test_a_folder_a_file_and_an_npz_are_the_same_model(folder, tmp_path):
    convert(folder, tmp_path / "x.npz")
    expected = None
    for path in (folder, str(folder), folder / "model.safetensors", tmp_path / "x.npz", tmp_path):
        model, tokenizer = load_hf_model(path, "cpu")
        assert tokenizer.decode(tokenizer.encode("a red bus")) == "a red bus"
        assert len(tokenizer) == model.config.text_config.vocab_size
        assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
        expected = logits_of(model) if expected is None else expected
        assert torch.equal(logits_of(model), expected)


def test_a_checkpoint_is_opened_once(folder, monkeypatch):
    """Opening checks every tensor, and compares whole matrices where the head is stored beside the embedding."""
    opened = []

    def watched(*given):
        opened.append(given)
        return open_checkpoint(*given)

    monkeypatch.setattr(paligemma.weights.finding, "open_checkpoint", watched)
    paligemma.load(folder, device="cpu")
    assert len(opened) == 1


def test_tiny_is_the_model_in_the_package(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # the name wins; the folder is "./tiny"
    assert Path(paligemma.utils.__file__).parent / "assets" / "tiny" == paligemma.weights.finding.TINY
    monkeypatch.setattr(paligemma.weights.finding, "TINY", folder)
    assert resolve("tiny") == folder
    assert resolve("./tiny") == Path("tiny")
    assert logits_of(load_hf_model("tiny", "cpu")[0]).isfinite().all()
    monkeypatch.setattr(paligemma.weights.finding, "TINY", tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="installed without the model that ships"):
        resolve("tiny")


def test_dtype_and_resolution(folder):
    assert load_hf_model(folder, "cpu")[0].dtype == torch.float32  # a small one keeps its own
    assert load_hf_model(folder, "cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_hf_model(folder, "cpu", dtype=torch.float16)[0].dtype == torch.float16
    assert load_hf_model(folder, "cpu", image_size=56)[0].config.vision_config.num_patches == 16
    with pytest.raises(ValueError, match="dtype is 'int4', expected one of bfloat16, float16, float32"):
        load_hf_model(folder, "cpu", dtype="int4")


@pytest.mark.parametrize("fast", [True, False])
def test_a_small_model_in_bfloat16_runs_in_float32_where_that_is_faster(folder, tmp_path, monkeypatch, fast):
    monkeypatch.setattr("paligemma.devices.cpu_multiplies_bfloat16", lambda: fast)
    convert(folder, tmp_path / "bf16", dtype="bfloat16")
    here = torch.bfloat16 if fast else torch.float32
    assert load_hf_model(tmp_path / "bf16", "cpu")[0].dtype == here
    assert paligemma.load(tmp_path / "bf16", "cpu").model.dtype == here
    assert load_hf_model(tmp_path / "bf16", "cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_hf_model(folder, "cpu")[0].dtype == torch.float32  # stored so
    assert stored_dtype(tmp_path / "bf16") == torch.bfloat16 and stored_dtype(folder) == torch.float32


def test_an_unknown_quantisation_is_refused(folder):
    with pytest.raises(ValueError, match="quantize is 'int3', expected one of bf16, int8, int4"):
        load_hf_model(folder, "cpu", quantize="int3")


def test_a_tokenizer_that_is_not_the_models(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["image_token_index"] -= 1
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'<image>' has id \d+, expected \d+"):
        load_hf_model(tmp_path / "a", "cpu")
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_hf_model(tmp_path / "a", "cpu")


# ------------------------------------------------------------------------------------------------ the hub


class Hub:
    """Stands in for `huggingface_hub.snapshot_download`: answers with a folder, or raises what it is told to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls: list[tuple[str, str | None, list[str]]] = []
        self.errors: dict[str | None, Exception] = {}  # by revision

    def __call__(self, repo_id, revision=None, allow_patterns=None):
        self.calls.append((repo_id, revision, allow_patterns))
        if revision in self.errors:
            raise self.errors[revision]
        return str(self.folder)

    @property
    def revisions(self):
        return [revision for _, revision, _ in self.calls]


@pytest.fixture
def hub(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub = Hub(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def http_error(kind):
    """An error of the hub's kind without the response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error.\nmore lines",)
    return error


def test_a_hub_id_is_downloaded_without_pickles(hub, folder):
    assert resolve("google/paligemma2-3b-mix-224") == folder
    assert logits_of(load_hf_model("google/paligemma2-3b-mix-224", "cpu")[0]).isfinite().all()
    name, revision, patterns = hub.calls[0]
    assert (name, revision) == ("google/paligemma2-3b-mix-224", None)
    wanted = huggingface_hub.utils.filter_repo_objects(
        [
            "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json",
            "tokenizer.model", "preprocessor_config.json", "pytorch_model.bin", "model.gguf", "README.md", "a.npz",
        ],
        allow_patterns=patterns,
    )  # fmt: skip
    assert list(wanted) == [
        "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json",
        "tokenizer.model", "preprocessor_config.json",
    ]  # fmt: skip


def test_settings_alone(hub):
    resolve("google/paligemma2-3b-mix-224", weights=False)
    (_, _, patterns) = hub.calls[0]
    assert not any("safetensors" in pattern for pattern in patterns)
    assert "mask_codec.npz" in patterns  # masks of training data are written with it before weights are read


def test_a_jax_repository_brings_its_npz(hub):
    resolve("google/paligemma2-28b-pt-224-jax")
    assert {"*.npz", "*.npz.part*"} <= set(hub.calls[0][2])


@pytest.mark.parametrize(
    ("name", "dtype", "revision"),
    [
        ("google/paligemma-3b-pt-224", None, "bfloat16"),
        ("google/paligemma-3b-ft-cococap-448", "bfloat16", "bfloat16"),
        ("google/paligemma-3b-pt-224", torch.float16, "float16"),
        ("google/paligemma-3b-pt-224", "float32", None),
        ("google/paligemma2-3b-pt-224", None, None),
        ("someone/paligemma-3b-mine", None, None),
    ],
)
def test_paligemma_1_comes_from_the_branch_with_half_the_bytes(hub, name, dtype, revision):
    resolve(name, dtype=dtype)
    assert hub.revisions == [revision]


def test_a_conversion_to_float32_starts_from_float32(hub, tmp_path):
    with contextlib.suppress(ValueError, OSError):  # the stand-in's folder holds no model
        convert("google/paligemma-3b-pt-224", tmp_path / "new", dtype="float32")
    assert hub.revisions == [None]


def test_a_revision_that_was_asked_for_is_taken(hub, tmp_path):
    resolve("google/paligemma-3b-pt-224", revision="abc")
    convert("google/paligemma-3b-pt-224", tmp_path / "new", revision="abc")
    assert hub.revisions == ["abc", "abc"]


def test_mistakes_in_a_target_are_told_before_a_download(hub):
    for command, target in (("convert", "x.safetensors"), ("merge", "x.safetensors"), ("merge", "x.npz")):
        done = CliRunner().invoke(app, [command, "google/paligemma2-3b-pt-224", target])
        assert "is to hold safetensors: name a folder" in str(done.exception)
    assert hub.calls == []


def test_what_is_no_adapter_is_seen_in_its_settings(hub):
    with pytest.raises(ValueError, match="google/paligemma2-3b-pt-224 is no adapter"):
        merge("google/paligemma2-3b-pt-224", "out")
    assert not any("safetensors" in pattern for _, _, patterns in hub.calls for pattern in patterns)


def test_main_will_do_where_the_branch_is_missing(hub, folder):
    hub.errors["bfloat16"] = http_error(errors.RevisionNotFoundError)
    assert resolve("google/paligemma-3b-pt-224") == folder
    hub.errors["bfloat16"] = errors.LocalEntryNotFoundError("only main is in the cache")
    assert resolve("google/paligemma-3b-pt-224") == folder
    assert hub.revisions == ["bfloat16", None] * 2


def test_a_gated_repository_says_the_two_steps(hub):
    hub.errors[None] = http_error(errors.GatedRepoError)
    with pytest.raises(PermissionError) as error:
        load_hf_model("google/paligemma2-3b-pt-224", "cpu")
    for part in (
        "https://huggingface.co/google/paligemma2-3b-pt-224",
        "accept its licence",
        "hf auth login",
        "HF_TOKEN",
    ):
        assert part in str(error.value)


def test_an_unknown_id_and_an_unknown_revision(hub):
    hub.errors[None] = http_error(errors.RepositoryNotFoundError)
    with pytest.raises(ValueError, match="google/paligemma3 is neither a folder here nor a repository on the hub"):
        resolve("google/paligemma3")
    hub.errors["v9"] = http_error(errors.RevisionNotFoundError)
    with pytest.raises(ValueError, match="google/paligemma2-3b-pt-224 has no revision 'v9'"):
        resolve("google/paligemma2-3b-pt-224", revision="v9")
    hub.errors[None] = errors.HFValidationError("Cannot have -- or .. in repo_id")
    with pytest.raises(ValueError, match=r"'a--b/c' is neither a folder here nor a possible hub id"):
        resolve("a--b/c")


def test_the_hub_is_out_of_reach(hub, monkeypatch):
    hub.errors[None] = errors.LocalEntryNotFoundError("Cannot find it.\nAt all.")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match=r"cannot be reached \(Cannot find it\.\): check the network"):
        resolve("google/paligemma2-3b-pt-224")
    hub.errors[None] = http_error(errors.HfHubHTTPError)
    with pytest.raises(ConnectionError, match=r"could not be downloaded: 401 Client Error\.$"):
        resolve("google/paligemma2-3b-pt-224")


def test_offline_names_the_id_and_the_variable(monkeypatch, tmp_path):
    """The real huggingface_hub, with an empty cache: it finds nothing without asking anybody."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"google/paligemma-3b-pt-224 is not .* HF_HUB_OFFLINE"):
        resolve("google/paligemma-3b-pt-224")


def test_offline_finds_what_is_in_the_cache(monkeypatch, tmp_path, folder):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    model, _ = load_hf_model("someone/small", "cpu")
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize(
    "name",
    ["./gone", "/gone/model", "~/gone", "gone", "a/b/c", "gone.npz", "runs/gone", "x/gone.npz", "C:\\gone", "../x/y"],
)
def test_what_looks_like_a_path_is_never_sent_to_the_hub(hub, tmp_path, name):
    (tmp_path / "runs").mkdir()  # so "runs/gone" is a path with a typing error, not somebody's repository
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        resolve(name)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        resolve(Path("someone/else"))
    assert hub.calls == []


def test_a_folder_of_the_owners_name_hides_no_published_model(hub, tmp_path, folder):
    (tmp_path / "google").mkdir()
    assert resolve("google/paligemma2-3b-pt-224") == folder
    (tmp_path / "someone").mkdir()
    with pytest.raises(FileNotFoundError, match=r"not asked, since a folder someone is here: .* another folder"):
        resolve("someone/paligemma-of-mine")


def test_a_published_name_without_its_owner(hub):
    with pytest.raises(FileNotFoundError, match="Did you mean google/paligemma2-3b-pt-224 on the hub"):
        resolve("paligemma2-3b-pt-224")


def test_a_folder_has_no_revision(folder):
    with pytest.raises(ValueError, match="only a hub id has revisions"):
        resolve(folder, revision="main")
