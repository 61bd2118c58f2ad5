"""What ``pooler_output`` of a saved student is, and that saving leaves the network in memory alone."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

import tests.helpers.networks as n
from coss_hf.models.backbone import Backbone
from coss_hf.models.pooler import PoolerOutput, pooler_output
from coss_hf.models.pooling import pool
from coss_hf.models.saving import save_network
from coss_hf.trainer.checkpointing import load_student

EMBEDDING, ZEROS, ABSENT, ANOTHER = PoolerOutput
NETWORKS = {
    "new_vit": lambda: ViTModel(ViTConfig(**n.SMALL)),
    "wide_pooler": lambda: ViTModel(ViTConfig(**n.SMALL, pooler_output_size=48)),  # of --student_config_overrides
    "new_siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**n.SMALL)),
}


def student(network: str, pooling: str) -> Backbone:
    torch.manual_seed(0)
    model = NETWORKS[network]() if network in NETWORKS else n.build(network)
    return Backbone(model, n.half(), pooling=pooling)


@pytest.mark.parametrize(
    ("network", "pooling", "expected"),
    [
        ("new_vit", "cls", EMBEDDING),
        ("new_vit", "mean", ZEROS),
        ("wide_pooler", "cls", EMBEDDING),
        ("new_siglip", "mean", ZEROS),
        ("vit", "cls", EMBEDDING),  # its classifier leaves the pooler out, and AutoModel builds one
        ("vit", "mean", ZEROS),
        ("dinov2", "cls", EMBEDDING),
        ("dinov2", "mean", ANOTHER),  # the class token, without a weight of its own
        ("dinov2_registers", "mean", ANOTHER),
        ("beit", "mean", ANOTHER),  # a norm of the same mean
        ("beit", "cls", ANOTHER),
        ("siglip_vision", "mean", ANOTHER),  # a head of the checkpoint
        ("clip_two_towers", "mean", ANOTHER),
        ("convnext", "gap", ANOTHER),
        ("resnet", "gap", EMBEDDING),
        ("data2vec", "mean", ABSENT),
    ],
)
def test_pooler_output_of_a_saved_student(tmp_path, network, pooling, expected):
    """DINOv2 by ``mean`` was said to have none; poolers of checkpoints and norms were set to zero, in place."""
    made = student(network, pooling)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    config = made.model.config.to_dict()
    kind = pooler_output(made)
    save_network(made, tmp_path)
    written = {key: made.model.config.to_dict()[key] for key in ("architectures", "dtype")}
    assert made.model.config.to_dict() == config | written
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    images = torch.randn(2, 3, *made.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [AutoModel.from_pretrained(tmp_path).eval()(pixel_values=images) for _ in range(2)]
        embedding = made.freeze().features(images).embedding
    if expected is ABSENT:
        assert kind is ABSENT and outputs[0].pooler_output is None
        return
    pooled = [output.pooler_output.flatten(1) for output in outputs]
    torch.testing.assert_close(pool(outputs[0], pooling, made.layout), embedding)
    assert torch.equal(*pooled), "nothing is drawn at the loading"
    assert kind is expected
    if expected is ZEROS:
        assert not pooled[0].any()
    else:
        cosine = torch.cosine_similarity(pooled[0], embedding)
        assert bool((cosine >= 0.9999).all()) == (expected is EMBEDDING)


@pytest.mark.parametrize(
    ("network", "pooling"), [("new_vit", "cls"), ("wide_pooler", "cls"), ("vit", "cls"), ("data2vec", "mean")]
)
def test_a_checkpoint_loads_into_a_network_of_another_pooler(tmp_path, network, pooling):
    made = student(network, pooling)
    save_network(made, tmp_path)
    other = student(network, pooling)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    load_student(
        SimpleNamespace(student=other, network=other.model, head=None, criterion=None), type(made.model), str(tmp_path)
    )
    state = other.model.state_dict()
    for name, value in made.model.state_dict().items():
        assert torch.equal(state[name], value) or name in made.pooler_alone


@pytest.mark.parametrize("network", ["new_vit", "new_siglip"])
def test_a_pooler_of_zeros_is_no_embedding(tmp_path, network):
    made = student(network, "mean")
    save_network(made, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pooling=pooler: .* has a pooler of zeros.*; use auto, cls, mean or gap"):
        Backbone(loaded, n.half(), pooling="pooler")
    loaded.config.embedding_pooling = "auto"
    assert Backbone(loaded, n.half()).pooling != "pooler"


@pytest.mark.parametrize(
    ("network", "pooling"), [("new_vit", "cls"), ("new_vit", "mean"), ("wide_pooler", "cls"), ("timm_vit", "mean")]
)
def test_a_saved_network_keeps_its_fingerprint(tmp_path, network, pooling):
    """Entries that change ``pooler_output`` alone made another network of it, so that nothing of a cache was found."""
    made = student(network, pooling) if network in NETWORKS else None
    if made is None:
        n.save(network, tmp_path / "published")
        from coss_hf.models.loading import load_backbone

        made = load_backbone(str(tmp_path / "published"), pooling=pooling)
    save_network(made, tmp_path / "saved")
    loaded = Backbone(AutoModel.from_pretrained(tmp_path / "saved"), made.processor)
    assert loaded.pooling == pooling and loaded.fingerprint() == made.fingerprint()
