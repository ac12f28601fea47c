"""Who computes: the decision, its reason, and the way around it."""

from threading import Thread

import pytest
import torch

from mossrlhf.kernels import backend, use_backend
from mossrlhf.kernels import row_stats as dispatch
from mossrlhf.kernels import row_stats as torch_rows


@pytest.fixture(params=[True, False], ids=["with triton", "without"])
def installed(request, monkeypatch):
    """Whether triton is there; what was decided before is forgotten, and afterwards too."""
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object() if request.param else None)
    dispatch._chosen.cache_clear()
    yield request.param
    dispatch._chosen.cache_clear()


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "mps", "xpu"])
def test_other_devices_are_torchs(installed, device):
    found = backend(device)
    assert found.name == "torch"
    kind = torch.device(device).type
    assert found.reason == f"the device is {kind!r}, and triton's kernels need CUDA"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 1)])
def test_cuda_is_tritons_where_it_is_installed(installed, device, dtype):
    found = backend(device, dtype)
    assert (found.name == "triton") == installed
    assert ("is installed" in found.reason) == installed
    assert backend(device).name == found.name


def test_float64_is_torchs(installed):
    found = backend("cuda", torch.float64)
    assert found.name == "torch"
    assert ("float64" in found.reason) == installed


def test_decided_once(installed, monkeypatch):
    first = backend("cuda")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: pytest.fail("asked again"))
    assert backend("cuda:3") is first


def test_of_logits():
    assert backend("cpu").functions == (torch_rows.torch_stats, torch_rows.torch_gradient)


def test_use_backend_holds_inside_only():
    with use_backend("triton"):
        assert backend("cpu") == dispatch.Backend("triton", "by use_backend()")
        with use_backend("torch"):
            assert backend("cuda").name == "torch"
        assert backend("cpu").name == "triton"
    assert backend("cpu").reason != "by use_backend()"


def test_use_backend_ends_with_an_error():
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert backend("cpu").name != "triton"


def test_use_backend_holds_on_other_threads():
    """Autograd computes gradients on CUDA on a thread of its own."""
    found = []
    with use_backend("triton"):
        thread = Thread(target=lambda: found.append(backend("cpu").name))
        thread.start()
        thread.join()
    assert found == ["triton"]


def test_use_backend_knows_its_names():
    with pytest.raises(ValueError, match="name: got 'cuda', expected one of triton, torch"):  # noqa: SIM117
        with use_backend("cuda"):
            pass
