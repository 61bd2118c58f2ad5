"""Launch configurations, mixed precision, memory format, batch norm over processes, compilation."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

import tests.helpers.runs as h
from coss_hf.losses.srrl import SRRLLoss
from coss_hf.models.backbone import Backbone
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.engine import synchronise_batch_norm, use_channels_last
from coss_hf.trainer.fsdp import name_blocks
from coss_hf.trainer.training_args import DistillationArguments
from tests.helpers.modules import torchvision_resnet
from tests.helpers.processes import run as run_program

ROOT = Path(__file__).resolve().parents[2]


# ---- configurations ----


@pytest.mark.parametrize(
    ("name", "kind", "processes", "precision"),
    [
        ("cpu", "MULTI_GPU", 2, "no"),
        ("single_gpu", "NO", 1, "bf16"),
        ("multi_gpu", "MULTI_GPU", 4, "bf16"),
        ("multi_node", "MULTI_GPU", 8, "bf16"),
        ("fsdp", "FSDP", 4, "bf16"),
        ("deepspeed_zero2", "DEEPSPEED", 4, "bf16"),
    ],
)
def test_accelerate_reads_each_configuration(name, kind, processes, precision):
    config = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type.value == kind and config.num_processes == processes
    assert config.mixed_precision == precision and config.use_cpu == (name == "cpu")
    assert config.num_machines == (2 if name == "multi_node" else 1)
    if name == "multi_node":
        assert config.main_process_ip and config.main_process_port and config.machine_rank == 0
        assert config.num_processes % config.num_machines == 0
    if name == "deepspeed_zero2":
        settings = config.deepspeed_config
        assert settings["zero_stage"] == 2 and settings["zero3_init_flag"] is False
        assert settings["gradient_accumulation_steps"] == settings["gradient_clipping"] == "auto"


def test_no_configuration_is_untested():
    found = {path.stem for path in (ROOT / "accelerate_configs").iterdir()}
    assert found == {"cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp", "deepspeed_zero2"}


def launched_environment(monkeypatch, name: str) -> None:
    """What ``accelerate launch`` hands to a process of this configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = ["--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml"), "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    for key, value in prepare_multi_gpu_env(args).items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)


def test_fsdp_settings_that_a_process_gets(monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    launched_environment(monkeypatch, "fsdp")
    plugin = FullyShardedDataParallelPlugin()
    assert os.environ["ACCELERATE_USE_FSDP"] == "true" and plugin.fsdp_version == 2
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and plugin.cpu_ram_efficient_loading is False


def test_blocks_are_those_the_student_has(tmp_path):
    for folder, blocks in ((h.save_vit(tmp_path / "vit"), 2), (h.save_resnet(tmp_path / "resnet"), 0)):
        student, model = load_backbone(folder).model, nn.Module()
        name_blocks(model, student)
        names = [type(module).__name__ for module in student.modules()]
        assert all(name in names for name in model._no_split_modules)
        assert sum(names.count(name) for name in model._no_split_modules if name.endswith("Layer")) == blocks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "false"}, "fsdp_version=1 does not work here: use 2"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type=SHARDED_STATE_DICT"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading=True"),
        ({"channels_last": True}, "--channels_last"),
    ],
)
def test_fsdp_settings_that_are_refused(tmp_path, monkeypatch, change, message):
    from types import SimpleNamespace

    from coss_hf.trainer.engine import check_engine

    launched_environment(monkeypatch, "fsdp")
    options = {"channels_last": False, "sync_batch_norm": False, "fsdp": None, "fsdp_plugin_args": None}
    options |= {"torch_compile_mode": None, "torch_compile_backend": None}
    args = SimpleNamespace(device=torch.device("cuda"), n_gpu=1, world_size=1, use_cpu=False, **options)
    check_engine(args)
    for key, value in change.items():
        monkeypatch.setenv(key, value) if key.isupper() else setattr(args, key, value)
    with pytest.raises(ValueError, match=message):
        check_engine(args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_gpu": 2}, "2 GPUs in one process: to use them, start by `coss-hf distill --num_processes 2`"),
        ({"WORLD_SIZE": "2"}, "2 processes were launched, but each would train alone.*add --use_cpu"),
    ],
)
def test_processes_that_are_refused(monkeypatch, change, message):
    from types import SimpleNamespace

    from coss_hf.trainer.engine import check_engine

    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    args = SimpleNamespace(device=torch.device("cuda"), n_gpu=1, world_size=1, sync_batch_norm=False, fsdp=None)
    args.torch_compile_mode = args.torch_compile_backend = None
    check_engine(args)
    for key, value in change.items():
        monkeypatch.setenv(key, value) if key.isupper() else setattr(args, key, value)
    with pytest.raises(ValueError, match=message):
        check_engine(args)


def test_the_recipe_refuses_fsdp_on_the_cpu(tmp_path):
    """accelerate would silently run DDP."""
    environment = os.environ | {"ACCELERATE_USE_FSDP": "true"}
    arguments = ["--teacher=x", "--student=y", "--dataset=z", "--use_cpu", f"--output_dir={tmp_path / 'out'}"]
    done = run_program([ROOT / "recipes" / "distill.py", *arguments], environment=environment)
    assert done.returncode == 2, done.stderr
    assert "FSDP was asked for, but --use_cpu is set" in done.stderr and "cpu.yaml" in done.stderr


def test_fsdp_as_an_argument_is_refused_on_the_cpu(tmp_path):
    with pytest.raises(ValueError, match="FSDP was asked for, but use_cpu is set"):
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, fsdp="full_shard")


# ---- mixed precision ----


def test_bf16(tmp_path, image_parquet, networks):
    """Matrix products in bfloat16, of teacher and student; weights, the loss and what it is computed from are not."""
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, bf16=True, learning_rate=0.002)
    seen = {}

    def watch(name):
        return lambda module, inputs, output: seen.update({name: output.dtype})

    first = next(m for m in trainer.teacher.model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(watch("teacher"))
    next(m for m in trainer.student.model.modules() if isinstance(m, nn.Linear)).register_forward_hook(watch("student"))
    compute = trainer.compute_loss

    def keep(*args, **kwargs):
        loss = compute(*args, **kwargs)
        seen["loss"] = loss.dtype
        return loss

    trainer.compute_loss = keep
    trainer.train()
    assert seen == {"teacher": torch.bfloat16, "student": torch.bfloat16, "loss": torch.float32}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    plain = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, bf16=False, learning_rate=0.002)
    plain.train()
    found, expected = ([x["loss"] for x in t.state.log_history if "loss" in x] for t in (trainer, plain))
    assert found == pytest.approx(expected, rel=0.05) and found != expected


# ---- channels-last ----


@pytest.fixture
def wide(tmp_path):
    """Teacher and student of 8 channels at least.

    With fewer, PyTorch 2.14 writes past its memory in the backward pass of a channels-last convolution on CPUs without
    AVX-512, and the process aborts.
    """
    return SimpleNamespace(
        teacher=h.save_resnet(tmp_path / "wide-teacher", seed=1, hidden_sizes=(8, 16, 32)),
        student=h.save_resnet(tmp_path / "wide-student", seed=2, hidden_sizes=(8, 16, 32)),
    )


def channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_channels_last_arrives_and_changes_nothing_else(tmp_path, image_parquet, wide):
    trained = {}
    for option in (False, True):
        trainer = h.make_trainer(
            tmp_path, image_parquet, wide.teacher, wide.student, channels_last=option, learning_rate=0.005
        )
        seen = []
        for network in (trainer.student.model, trainer.teacher.model):
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(
                        lambda m, x, y, seen=seen: seen.append((channels_last(x[0]), channels_last(y)))
                    )
        trainer.train()
        trainer.save_model()
        assert len(seen) >= 2 * 7 and all(both == (option, option) for both in seen)
        for network in (trainer.student.model, trainer.teacher.model):
            kernels = [p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
            assert kernels and all(channels_last(kernel) == option for kernel in kernels)
        trained[option] = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in trained[False].items():
        torch.testing.assert_close(trained[True][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_channels_last_is_set_up_once_for_a_network_of_several_trainers():
    network = nn.Conv2d(3, 4, 3)
    for _ in range(3):
        use_channels_last(network)
    assert len(network._forward_pre_hooks) == 1, "each trainer left one more"


def test_channels_last_resumes(tmp_path, image_parquet, wide):
    options = {"channels_last": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = h.make_trainer(tmp_path, image_parquet, wide.teacher, wide.student, **options)
    whole.train()
    again = h.make_trainer(tmp_path, image_parquet, wide.teacher, wide.student, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    h.assert_same(h.state(whole), h.state(again))


# ---- batch norm over processes ----


def test_batch_norm_is_converted_and_the_student_stays_what_it_was(tmp_path):
    folder = h.save_resnet(tmp_path / "student", seed=2)
    student = load_backbone(folder).model
    before, state = type(student), {name: tensor.clone() for name, tensor in student.state_dict().items()}
    images = torch.randn(2, 3, 16, 16)
    expected = student.eval()(pixel_values=images).pooler_output
    loss = SRRLLoss(student_dim=3, teacher_dim=4)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in student.modules())
    synchronise_batch_norm(student, loss)
    kinds = [type(m) for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [nn.SyncBatchNorm] * count and count > 5 and type(student) is before
    assert isinstance(loss.connector.bn, nn.SyncBatchNorm)
    h.assert_same(student.state_dict(), state)
    torch.testing.assert_close(student(pixel_values=images).pooler_output, expected)
    student.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in again.modules())
    h.assert_same(again.state_dict(), state)


def test_a_module_of_the_caller_follows_its_converted_batch_norm():
    """Its statistics stayed those of before the training, where `to` or a step puts new ones."""
    module = torchvision_resnet()
    network = Backbone.from_module(module, size=32).model
    synchronise_batch_norm(network, nn.Identity())
    converted = network.module.bn1
    assert isinstance(converted, nn.SyncBatchNorm) and isinstance(module.bn1, nn.BatchNorm2d)
    network.to(torch.float64)
    converted.running_mean = torch.ones(64)
    assert module.bn1.weight is converted.weight and module.bn1.running_mean is converted.running_mean


def test_activations_inside_timms_batch_norm_survive():
    """PyTorch's own conversion would drop them without a word."""
    layers = pytest.importorskip("timm.layers")
    from transformers import TimmWrapperConfig, TimmWrapperModel

    config = TimmWrapperConfig(architecture="mobilenetv3_small_050", do_pooling=True, num_classes=0)
    model = TimmWrapperModel(config).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(pixel_values=images).pooler_output
    synchronise_batch_norm(model, nn.Identity())
    assert any(isinstance(m, layers.SyncBatchNormAct) for m in model.modules())
    torch.testing.assert_close(model(pixel_values=images).pooler_output, expected)


def test_sync_batch_norm_is_rejected_where_it_is_impossible(tmp_path):
    with pytest.raises(ValueError, match="^sync_batch_norm: PyTorch synchronises batch norm on GPUs only"):
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, sync_batch_norm=True)
    with pytest.raises(ValueError, match="--sync_batch_norm: the student .ViTModel. has no batch norm"):
        synchronise_batch_norm(load_backbone(h.save_vit(tmp_path / "vit")).model, nn.Identity())

    class Own(nn.BatchNorm2d):
        pass

    student = load_backbone(h.save_resnet(tmp_path / "resnet")).model
    student.extra = Own(3)
    with pytest.raises(ValueError, match="--sync_batch_norm cannot convert Own"):
        synchronise_batch_norm(student, nn.Identity())


# ---- compilation ----


def test_graphs_and_accumulated_gradients_exclude_each_other(tmp_path):
    for graphs in ({"torch_compile_mode": "reduce-overhead"}, {"torch_compile_backend": "cudagraphs"}):
        with pytest.raises(ValueError, match="CUDA graphs .* gradient_accumulation_steps=2 adds"):
            DistillationArguments(str(tmp_path), use_cpu=True, gradient_accumulation_steps=2, **graphs)


@pytest.mark.slow  # 30 s
def test_torch_compile(tmp_path, image_parquet, networks):
    """The same training, and keys in the file as ever."""
    losses = []
    for compiled in (False, True):
        trainer = h.make_trainer(
            tmp_path, image_parquet, networks.teacher, networks.vit, torch_compile=compiled, learning_rate=0.002
        )
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    trainer.save_model()
    plain = AutoModel.from_pretrained(networks.vit)
    plain.save_pretrained(tmp_path / "plain")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
    again = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    h.assert_same(again, trainer.student.model.state_dict())
