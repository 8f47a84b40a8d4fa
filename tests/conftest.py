"""Small objects that several tests use."""

import pytest
import torch

from guided_diffusion.script_util import create_model_and_diffusion
from small import SMALL, randomised


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Neither what the user's cache holds nor what another process puts there counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=[False, True], ids=["legacy order", "new order"])
def any_order(request):
    """A small network of either qkv order."""
    torch.manual_seed(0)
    return randomised(create_model_and_diffusion(**SMALL, use_new_attention_order=request.param)[0])


@pytest.fixture
def small():
    """(network, diffusion): 16×16, attention everywhere, 8 respaced steps."""
    torch.manual_seed(0)
    network, diffusion = create_model_and_diffusion(**SMALL)
    return randomised(network), diffusion


@pytest.fixture
def small_conditional():
    """As `small`, with 4 classes and a null label."""
    torch.manual_seed(0)
    network, diffusion = create_model_and_diffusion(**SMALL, class_cond=True, num_classes=4, null_label=True)
    return randomised(network), diffusion


@pytest.fixture
def full_disk(request):
    """Let every file end at so many bytes from now on: the system refuses to write more, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.node.after_call = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Take the end of files away before pytest itself writes on, which may be to a file."""
    try:
        return (yield)
    finally:
        getattr(item, "after_call", lambda: None)()
