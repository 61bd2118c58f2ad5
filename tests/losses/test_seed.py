import pytest
import torch

from coss_hf.features import Features
from coss_hf.losses.seed import SEEDLoss
from tests.helpers.loss_cases import assert_gradients, draw
from tests.helpers.loss_references import reference_cases
from tests.helpers.loss_tolerances import TOLERANCES

SIZES = {"teacher_dim": 3, "num_images": 13, "batch_size": 4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_equal_the_reference(shared, dtype):
    for _, meta, x in reference_cases(shared, "seed"):
        names = {"queue_size": "K", "student_temperature": "t_student", "teacher_temperature": "t_teacher"}
        options = {ours: meta[name] for ours, name in names.items()}
        loss = SEEDLoss(teacher_dim=meta["dim"], num_images=meta["K"], batch_size=4, **options)
        loss.load_state_dict({"queue": x["in.queue"], "ptr": torch.tensor([meta["ptr"]])})
        loss.to(dtype)
        for step in range(meta["steps"]):
            s, t = (x[f"in.{side}{step}"].to(dtype).requires_grad_() for side in "st")
            value = loss(Features(s), Features(t))["loss"]
            value.backward()
            rtol = TOLERANCES[dtype][0]
            torch.testing.assert_close(value.double(), x[f"out.loss_step{step}"].reshape(()), rtol=rtol, atol=0)
            assert_gradients({f"in.s{step}": s.grad}, x, f"grad_step{step}.")
            assert t.grad is None
            torch.testing.assert_close(loss.queue.double(), x[f"out.queue_after{step}"].double(), rtol=rtol, atol=rtol)
            assert torch.equal(loss.ptr, x[f"out.ptr_after{step}"].reshape(1))


def test_the_queue_wraps_around_and_rests_in_evaluation():
    loss = SEEDLoss(**SIZES)
    assert loss.queue.shape == (3, 12)
    batches = [draw((4, 3), seed=i)[0] for i in range(4)]
    for t in batches:
        loss(Features(t), Features(t))
    unit = torch.nn.functional.normalize(torch.cat([batches[3], *batches[1:3]]))
    torch.testing.assert_close(loss.queue, unit.T)
    loss.eval()(Features(batches[0]), Features(batches[0]))
    torch.testing.assert_close(loss.queue, unit.T)


def test_lengths_do_not_matter():
    loss = SEEDLoss(**SIZES).eval()
    s, t = draw((4, 3), (4, 3))
    torch.testing.assert_close(loss(Features(5 * s), Features(t / 3)), loss(Features(s), Features(t)))


def test_stays_float32_under_autocast():
    s, t = draw((4, 3), (4, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert SEEDLoss(**SIZES)(Features(s.bfloat16()), Features(t.bfloat16()))["loss"].dtype == torch.float32


@pytest.mark.parametrize(
    ("size", "message"), [(6, "multiple of the batch of 4"), (16, "at most 12"), (0, "at most 12")]
)
def test_bad_queues_are_refused(size, message):
    with pytest.raises(ValueError, match=f"queue_size={size} .*{message}"):
        SEEDLoss(**SIZES, queue_size=size)
    with pytest.raises(ValueError, match="head"):
        SEEDLoss(**SIZES)(Features(torch.randn(4, 2)), Features(torch.randn(4, 3)))
