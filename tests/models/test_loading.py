"""Teachers and students by name: what is passed on, what is built at random weights, what is refused and how."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BeitForImageClassification,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

import coss_hf.models.loading
import coss_hf.utils.hub_lookup
from coss_hf.models.backbone import Backbone
from coss_hf.models.cifar.modeling_cifar_resnet import CifarResNetModel
from coss_hf.models.cifar.registry import cifar_config
from coss_hf.models.embedding import embed, embed_dataset
from coss_hf.models.loading import load_backbone, missing_weights
from coss_hf.trainer.arguments import ModelArguments
from tests.helpers.networks import SMALL, half, images, save


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of small checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("vit", "resnet", "convnext", "swin", "dinov2", "clip_two_towers", "timm_vit"):
        save(name, folder / name)
    BertModel(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        folder / "bert"
    )
    return folder


@pytest.fixture
def teacher(world):
    return load_backbone(str(world / "vit"), argument="teacher")


def refused(match, name, **options):
    with pytest.raises(ValueError, match=match) as error:
        load_backbone(str(name), **{"argument": "student", **options})
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- what is passed on ----


def test_dtype(world, tmp_path):
    half_precision = load_backbone(str(world / "vit"), dtype="bfloat16").freeze()
    assert {p.dtype for p in half_precision.model.parameters()} == {torch.bfloat16}
    exact = load_backbone(str(world / "vit")).freeze()
    pixels = [*exact.preprocess(images())]
    rows = embed_dataset(half_precision, pixels)
    assert rows.dtype == torch.float32
    cosine = torch.cosine_similarity(rows, embed_dataset(exact, pixels))
    assert (cosine > 0.999).all() and not (cosine == 1).all()
    half_precision.model.save_pretrained(tmp_path)
    half().save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path), dtype="auto").model.dtype == torch.bfloat16
    assert load_backbone(str(tmp_path)).model.dtype == torch.float32
    refused("^--student_dtype='int8' is unknown: choose one of auto, float32", world / "vit", dtype="int8")


@pytest.mark.parametrize("init", ["pretrained", "random", "teacher_layers"])
def test_attention_and_dtype_reach_every_way_of_loading(init, world, teacher):
    options = {"init": init, "attn_implementation": "eager", "dtype": "bfloat16", "teacher": teacher}
    loaded = load_backbone(str(world / "vit"), **options)
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.model.dtype == torch.bfloat16


def test_revision_and_trust_remote_code_are_forwarded(world, monkeypatch):
    seen = []
    for auto in (
        coss_hf.models.loading.AutoConfig,
        coss_hf.models.loading.AutoModel,
        coss_hf.models.loading.AutoImageProcessor,
    ):
        original = auto.from_pretrained

        def spy(name, *args, original=original, **kwargs):
            seen.append((kwargs["revision"], kwargs["trust_remote_code"]))
            return original(name, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", spy)
    load_backbone(str(world / "vit"), revision="v2", trust_remote_code=True)
    assert seen == [("v2", True)] * 3


def test_code_in_a_checkpoint_runs_only_if_allowed(own_code):
    refused("^--teacher=.*checkpoint brings code of its own; .*--trust_remote_code", own_code, argument="teacher")
    loaded = load_backbone(str(own_code), trust_remote_code=True)
    assert type(loaded.model).__module__.startswith("transformers_modules")
    model = CifarResNetModel(cifar_config("resnet8x4"))
    model.load_state_dict(loaded.model.state_dict())
    assert torch.equal(embed(loaded, images()), embed(model, loaded.preprocess(images())))


# ---- random weights ----


@pytest.mark.parametrize(
    "name, overrides, dim",
    [
        ("resnet20", {}, 64),
        ("resnet8x4", {"shortcut": "padding"}, 256),
        ("resnet", {"depths": [1, 1], "hidden_sizes": [4, 8], "embedding_size": 4, "layer_type": "basic"}, 8),
        ("dinov2", {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "image_size": 32}, 32),
        ("timm_wrapper", {"architecture": "test_resnet"}, 96),
    ],
)
def test_random_weights_of_an_architecture(name, overrides, dim, teacher):
    student = load_backbone(name, argument="student", init="random", config_overrides=overrides, teacher=teacher)
    assert student.dim == dim and student.name == name
    for key, value in overrides.items():
        assert getattr(student.model.config, key) == value
    assert embed(student, images()).shape == (3, dim)


def test_random_weights_of_a_checkpoints_architecture(world):
    options = {"init": "random", "config_overrides": {"depths": [1, 2, 1, 1]}}
    torch.manual_seed(1)
    one = load_backbone(str(world / "convnext"), **options)
    torch.manual_seed(1)
    same = load_backbone(str(world / "convnext"), **options)
    assert one.model.config.depths == [1, 2, 1, 1]
    assert one.fingerprint() == same.fingerprint() != load_backbone(str(world / "convnext"), **options).fingerprint()


def test_overrides_are_checked(world):
    both = {"init": "random", "config_overrides": {"hidden_sise": 8}}
    message = refused("^--student_config_overrides: ViTConfig has no entry 'hidden_sise'", world / "vit", **both)
    assert "Did you mean hidden_size" in message
    both["config_overrides"] = {"hidden_size": "wide"}
    refused("^--student_config_overrides=.*ViTConfig refuses this", world / "vit", **both)
    both = {"config_overrides": {"hidden_size": 64}}
    refused("a pretrained checkpoint has its own shape; use --student_init random", world / "vit", **both)
    refused("^--student_init='fresh' is unknown", world / "vit", init="fresh")


# ---- layers of the teacher ----


@pytest.mark.parametrize(
    "kept, layers", [(6, [0, 2, 4, 7, 9, 11]), (4, [0, 4, 7, 11]), (1, [0]), (12, list(range(12)))]
)
def test_every_nth_layer(kept, layers, tmp_path):
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**{**SMALL, "num_hidden_layers": 12}))
    teacher = Backbone(model, half(), pooling="mean")
    options = {} if kept == 6 else {"config_overrides": {"num_hidden_layers": kept}}
    student = load_backbone(None, argument="student", init="teacher_layers", teacher=teacher, **options)
    assert student.pooling == "mean" and student.processor.to_dict() == teacher.processor.to_dict()
    assert student.model.config.num_hidden_layers == kept and teacher.model.config.num_hidden_layers == 12
    for mine, theirs in zip(stack(student.model), (stack(teacher.model)[i] for i in layers), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    shared = {name for name in student.model.state_dict() if "layer." not in name}
    assert len(shared) > 5
    assert all(torch.equal(student.model.state_dict()[name], teacher.model.state_dict()[name]) for name in shared)
    if kept == 12:
        assert torch.equal(embed(student, images()), embed(teacher, images()))
    student.model.save_pretrained(tmp_path)
    student.processor.save_pretrained(tmp_path)
    assert torch.equal(embed(str(tmp_path), images()), embed(student, images()))


def stack(model: PreTrainedModel) -> torch.nn.ModuleList:
    timm_blocks = getattr(getattr(model, "timm_model", None), "blocks", None)
    return timm_blocks or next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


@pytest.mark.parametrize("name", ["vit", "clip_two_towers", "timm_vit"])
def test_layers_of_other_transformers(name, world, tmp_path):
    teacher = load_backbone(str(world / name))
    student = load_backbone(None, init="teacher_layers", teacher=teacher)
    assert student.pooling == teacher.pooling and len(stack(student.model)) == 1
    assert embed(student, images()).shape == (3, teacher.dim)
    first, source = (next(stack(backbone.model).parameters()) for backbone in (student, teacher))
    assert torch.equal(first, source)
    student.model.save_pretrained(tmp_path)
    student.processor.save_pretrained(tmp_path)
    assert torch.equal(embed(str(tmp_path), images()), embed(student, images()))


@pytest.mark.parametrize("name", ["resnet", "convnext", "swin"])
def test_teacher_layers_rejects_networks_without_a_plain_stack(name, world):
    message = f"^--student_init=teacher_layers: .*{name}.* is no plain stack of transformer layers"
    with pytest.raises(ValueError, match=message):
        load_backbone(None, argument="student", init="teacher_layers", teacher=load_backbone(str(world / name)))


def test_layers_are_checked(teacher):
    options = {"argument": "student", "init": "teacher_layers"}
    with pytest.raises(ValueError, match="needs a teacher"):
        load_backbone(None, **options)
    for wrong in (0, 3, "two"):
        with pytest.raises(ValueError, match=rf"num_hidden_layers={wrong} must lie in 1\.\.2"):
            load_backbone(None, **options, teacher=teacher, config_overrides={"num_hidden_layers": wrong})
    with pytest.raises(ValueError, match="only num_hidden_layers can differ"):
        load_backbone(None, **options, teacher=teacher, config_overrides={"hidden_size": 8})
    with pytest.raises(ValueError, match="weights are not in the checkpoint"):
        load_backbone(None, **options, teacher=teacher, pooling="pooler")


# ---- image processors ----


def test_a_student_without_processor_gets_the_teachers(world, teacher, tmp_path, caplog):
    shutil.copytree(world / "resnet", tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    student = load_backbone(str(tmp_path / "bare"), argument="student", teacher=teacher)
    assert student.processor is teacher.processor
    refused("^--student=.*bare: no image processor is next to its weights", tmp_path / "bare")
    refused("^--student=resnet20: no image processor", "resnet20", init="random")


def test_a_timm_student_has_timms_own_statistics(teacher, tmp_path):
    overrides = {"architecture": "mobilenetv3_small_050"}
    student = load_backbone("timm_wrapper", init="random", config_overrides=overrides, teacher=teacher, size=64)
    assert student.processor is not teacher.processor
    student.model.save_pretrained(tmp_path)
    student.processor.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert tuple(processor.data_config["mean"]) == (0.485, 0.456, 0.406)
    pixels = processor(images())["pixel_values"]
    assert torch.equal(pixels, student.preprocess(images())) and pixels.shape == (3, 3, 64, 64)
    with torch.no_grad():
        output = AutoModel.from_pretrained(tmp_path).eval()(pixels)
    assert torch.equal(output.pooler_output, embed(student, images()))


# ---- names that do not exist, incomplete checkpoints ----


def test_unknown_names_suggest_similar_ones(world):
    began = time.time()
    message = refused("^--student=.*resnett is no folder", world / "resnett")
    assert f"Did you mean {world / 'resnet'} or " in message
    assert "Hub cannot be reached" in refused("^--student=resnet21 is no folder.*Did you mean .*resnet20", "resnet21")
    refused("Hub cannot be reached", "some-one/unheard-of-network")
    assert time.time() - began < 10
    refused("^--student=resnet20 .*an architecture without weights: --student_init random", "resnet20")
    refused("^--student=.*no config.json of a known network can be read", world)


def test_a_run_without_a_saved_student_is_named(world, tmp_path):
    """It was said to be no known network."""
    shutil.copytree(world / "resnet", tmp_path / "run" / "checkpoint-30")
    refused(r"^--student=.* no saved student: trainer.save_model\(\) .*run/checkpoint-30\.$", tmp_path / "run")


@pytest.mark.parametrize(
    "error, revision, match",
    [
        (
            RepositoryNotFoundError,
            None,
            "^--student=google/vit-bse is no folder, nor a model on the Hub.*hf auth login",
        ),
        (RevisionNotFoundError, "v9", "^--student_revision=v9: google/vit-bse has no such branch, tag or commit"),
        (ConnectionError, None, "in the local cache, and the Hub cannot be reached"),
    ],
)
def test_what_the_hub_answers(error, revision, match, monkeypatch, caplog):
    class Hub:
        def model_info(self, name, revision, timeout):
            raise error.__new__(error, "Name or service not known")

        def list_models(self, search, limit):
            return [type("Model", (), {"id": "google/vit-base-patch16-224"}), type("Model", (), {"id": "vit-base"})]

    for module in (coss_hf.models.loading, coss_hf.utils.hub_lookup):
        monkeypatch.setattr(module, "HfApi", Hub)
    message = refused(match, "google/vit-bse", revision=revision)
    # A Hub that did not answer is not asked again: its client would retry for half a minute.
    assert ("Did you mean vit-base" in message) == (error is RepositoryNotFoundError)
    if error is ConnectionError:
        assert "The Hub cannot be reached (Name or service not known)" in caplog.text


@pytest.mark.parametrize(
    ("is_cached", "expected"), [(True, {"revision": "abc", "local_files_only": True}), (False, {"revision": None})]
)
def test_the_commit_of_a_network_in_memory_may_be_gone_from_the_hub(is_cached, expected, monkeypatch):
    """It was refused for a revision that nobody gave."""

    class Hub:
        def model_info(self, name, revision, timeout):
            raise RevisionNotFoundError.__new__(RevisionNotFoundError, "no such revision")

    asked = []
    loading = coss_hf.models.loading
    monkeypatch.setattr(loading, "HfApi", Hub)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *args, **options: "a file" if is_cached else None)
    monkeypatch.setattr(loading, "_processor_file", lambda name, argument, hub: asked.append(hub))
    model = SimpleNamespace(name_or_path="me/squashed", config=SimpleNamespace(_commit_hash="abc"))
    teacher = SimpleNamespace(processor="the teacher's")
    assert loading.find_processor(model, teacher, argument="student") == "the teacher's"
    assert asked == [{"trust_remote_code": False} | expected]


def test_a_text_network_is_refused_before_its_weights_are_read(world):
    (world / "bert" / "model.safetensors").write_bytes(b"not weights")
    message = refused(r"^--teacher: BertModel \(bert\) reads input_ids, not images", world / "bert", argument="teacher")
    assert "ViT" in message
    refused("BertModel", "bert", init="random")


def test_damaged_weights_are_refused(world, tmp_path):
    shutil.copytree(world / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"x" * 100)
    refused("^--teacher=.*cannot be loaded as a vision network.*header", tmp_path / "vit", argument="teacher")
    (tmp_path / "vit" / "model.safetensors").unlink()
    refused("^--teacher=.*cannot be loaded.*no file named", tmp_path / "vit", argument="teacher")
    (tmp_path / "vit" / "config.json").write_text("{")
    refused("^--teacher=.*no config.json of a known network can be read", tmp_path / "vit", argument="teacher")


@pytest.mark.parametrize(
    "name, lost", [("vit", "layer.0.output.dense.weight"), ("vit", "layernorm.bias"), ("resnet", "running_mean")]
)
def test_weights_that_the_embedding_needs_must_be_in_the_checkpoint(name, lost, world, tmp_path):
    shutil.copytree(world / name, tmp_path / name)
    file = tmp_path / name / "model.safetensors"
    state = load_file(file)
    gone = [key for key in state if key.endswith(lost)]
    save_file({key: value for key, value in state.items() if key not in gone}, file, {"format": "pt"})
    assert gone
    refused(
        f"^--teacher=.*lacks weights that the embedding needs.*{len(gone)} in all", tmp_path / name, argument="teacher"
    )
    model = AutoModel.from_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="^model=.*lacks weights that the embedding needs"):
        embed(model, images())


def test_weights_that_were_trained_since_are_not_missing(tmp_path):
    """A pooler that was trained in memory was dropped for want of one in the files, until the network was saved."""
    save("beit_without_pooler", tmp_path / "pretrained")
    network = BeitForImageClassification.from_pretrained(tmp_path / "pretrained", num_labels=3)
    pooler = {"pooler.layernorm.weight", "pooler.layernorm.bias"}
    assert missing_weights(network.beit, network.name_or_path) == pooler
    with torch.no_grad():
        network.beit.pooler.layernorm.weight.add_(torch.rand(32))
    assert not missing_weights(network.beit, network.name_or_path)
    assert Backbone(network, half()).pooling == "pooler"


@pytest.mark.parametrize("name", ["vit", "siglip_vision"])
def test_a_pooler_at_random_weights_is_missing(name, tmp_path):
    """SigLIP's has biases that are drawn, which tell no more than its matrices."""
    save(name, tmp_path / "full")
    weights = load_file(tmp_path / "full" / "model.safetensors")
    kept = {key: value for key, value in weights.items() if ".head." not in f".{key}" and "pooler" not in key}
    save_file(kept, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    network = AutoModel.from_pretrained(tmp_path / "full")
    if name == "siglip_vision":
        assert network.head.mlp.fc1.bias.any()
    missing = missing_weights(network, network.name_or_path)
    assert missing == {key for key, _ in network.named_parameters() if key.startswith(("head.", "pooler."))}
    norm_or_bias = network.head.layernorm.weight if name == "siglip_vision" else network.pooler.dense.bias
    nn.init.normal_(norm_or_bias)
    assert not missing_weights(network, network.name_or_path)


def test_misshapen_weights_are_refused(world, tmp_path):
    shutil.copytree(world / "vit", tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    refused("^--student=.*cannot be loaded", tmp_path / "vit")


# ---- typos in --student_config_overrides ----


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm:resnet10t", "resnet10t", "timm/resnet10t.c3_in1k"])
def test_a_network_of_timm_without_weights_is_named(name):
    """CIFAR networks were suggested."""
    pytest.importorskip("timm")
    refused("timm_wrapper --student_init random --student_config_overrides architecture=resnet10t builds", name)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit", {"hiden_size": 16}, "has no entry 'hiden_size'. Did you mean hidden_size"),
        ("vit", {"hidden_size": "large"}, "^--student_config_overrides={'hidden_size': 'large'}"),
        ("vit", {"patch_size": 0}, "^--student_config_overrides={'patch_size': 0}: ViTConfig cannot be built"),
        ("timm_wrapper", {"architecture": "mobilenetv3_smal_050"}, "Did you mean architecture=.*mobilenetv3_small_050"),
        ("timm_wrapper", {}, "^--student=timm_wrapper: which .*--student_config_overrides architecture=resnet18"),
        ("timm_wrapper", {"architecture": "resnet18", "model_args": {"dept": 3}}, "^--student_config_overrides=.*dept"),
    ],
)
def test_invalid_config_overrides_are_rejected(teacher, name, overrides, message):
    refused(message, name, init="random", config_overrides=overrides, teacher=teacher)


def test_unreadable_config_override_is_rejected():
    models = ModelArguments(student_config_overrides=["hidden_sizes=[4, 8"])
    with pytest.raises(ValueError, match=r"^--student_config_overrides hidden_sizes=\[4, 8: the value cannot be read"):
        models.overrides()


def test_layers_of_the_tower_of_a_classifier():
    """It has no pooler, and a network that is built alone has one."""
    classifier = ViTForImageClassification(ViTConfig(**{**SMALL, "num_hidden_layers": 4}))
    teacher = Backbone(classifier, half())
    student = load_backbone(None, argument="student", init="teacher_layers", teacher=teacher)
    assert student.pooling == "cls" and len(stack(student.model)) == 2
    assert student.missing >= {"pooler.dense.weight"}
    with pytest.raises(ValueError, match="weights are not in the checkpoint"):
        load_backbone(None, argument="student", init="teacher_layers", teacher=teacher, pooling="pooler")
