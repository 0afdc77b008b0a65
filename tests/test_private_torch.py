"""What gradacc uses of torch that torch does not promise, each by name: why pyproject.toml bounds its version from above.

A new version is allowed when all of this passes with it; what is red says which part is another one.
"""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.utils import checkpoint

PACKAGE = Path(__file__).parent.parent / "gradacc"

_WEIGHT = torch.ones(4, 4, requires_grad=True)
_OPERANDS = {"linear": F.linear(_WEIGHT, _WEIGHT).grad_fn, "embedding": F.embedding(torch.tensor([0]), _WEIGHT).grad_fn}

IMPORTS = """
from torch._dynamo.comptime import comptime
from torch._dynamo.exc import TorchRuntimeError
from torch._dynamo.exc import UncapturedHigherOrderOpError
from torch._dynamo.exc import Unsupported
from torch._dynamo.variables import higher_order_ops
from torch._higher_order_ops.scan import scan
from torch._inductor import ir
from torch._inductor import lowering
from torch._inductor.fx_passes import post_grad
from torch._inductor.fx_passes import reinplace
from torch._inductor.fx_utils import get_node_storage
from torch._inductor.pattern_matcher import Arg
from torch._inductor.pattern_matcher import CallFunction
from torch._inductor.pattern_matcher import CallFunctionVarArgs
from torch._inductor.pattern_matcher import Match
from torch._inductor.pattern_matcher import register_graph_pattern
from torch._inductor.virtualized import V
from torch._ops import HigherOrderOperator
from torch._functorch.pyfunctorch import VmapInterpreter
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
import torch.utils._pytree
""".strip().splitlines()


def _divided():
    """What FSDP knows of a module."""
    state = FSDPState()
    state.init((nn.Linear(1, 1),), torch.device("cpu"), MixedPrecisionPolicy(), True)
    return state


ATTRIBUTES = {
    "_C": lambda: torch._C,
    "_are_functorch_transforms_active": lambda: torch._C._are_functorch_transforms_active(),
    "_autograd": lambda: torch._C._autograd,
    "_backward_cls": lambda: checkpoint.CheckpointFunction._backward_cls,
    "_backward_hooks": lambda: _WEIGHT._backward_hooks,
    "_base": lambda: _WEIGHT._base,
    "_buffers": lambda: nn.Linear(1, 1)._buffers,
    "_cache": lambda: nn.utils.parametrize._cache,
    "_cache_enabled": lambda: nn.utils.parametrize._cache_enabled,
    "_cdata": lambda: _WEIGHT.untyped_storage()._cdata,
    "_compiled_call_impl": lambda: nn.Linear(1, 1)._compiled_call_impl,
    "_CheckpointFrame": lambda: checkpoint._CheckpointFrame,
    "_current_graph_task_id": lambda: torch._C._current_graph_task_id(),
    "_resolve_process_group": lambda: distributed_c10d._resolve_process_group,
    "_current_level": lambda: forward_ad._current_level,
    "_dynamo": lambda: torch._C._dynamo,
    "_foreach_add": lambda: torch._foreach_add,
    "_foreach_add_": lambda: torch._foreach_add_,
    "_foreach_addcdiv_": lambda: torch._foreach_addcdiv_,
    "_foreach_addcmul_": lambda: torch._foreach_addcmul_,
    "_foreach_copy_": lambda: torch._foreach_copy_,
    "_foreach_div_": lambda: torch._foreach_div_,
    "_foreach_lerp_": lambda: torch._foreach_lerp_,
    "_foreach_maximum_": lambda: torch._foreach_maximum_,
    "_foreach_mul": lambda: torch._foreach_mul,
    "_foreach_mul_": lambda: torch._foreach_mul_,
    "_foreach_sqrt": lambda: torch._foreach_sqrt,
    "_fsdp_param_groups": lambda: _divided()._fsdp_param_groups,
    "_functions": lambda: torch._C._functions.AccumulateGrad,
    "_functorch": lambda: (
        torch._C._functorch.is_functorch_wrapped_tensor,
        torch._C._functorch.is_batchedtensor,
        torch._C._functorch.get_unwrapped,
    ),
    "_FrameAction": lambda: torch._C._dynamo.eval_frame._FrameAction,
    "_FrameExecStrategy": lambda: torch._C._dynamo.eval_frame._FrameExecStrategy,
    "_fused_sdp_choice": lambda: torch.ops.aten._fused_sdp_choice.default,
    "_get_current_graph_task_keep_graph": lambda: torch._C._autograd._get_current_graph_task_keep_graph(),
    "_get_fsdp_state": lambda: FSDPModule._get_fsdp_state,
    "_get_object_coll_device": lambda: torch.distributed.distributed_c10d._get_object_coll_device,
    "_is_view": lambda: _WEIGHT._is_view(),
    "_is_zerotensor": lambda: _WEIGHT._is_zerotensor(),
    "_mp_policy": lambda: _divided()._mp_policy,
    "_modules": lambda: nn.Linear(1, 1)._modules,
    "_parameters": lambda: nn.Linear(1, 1)._parameters,
    "_post_forward_hook_handle": lambda: _divided()._post_forward_hook_handle,
    "_pre_forward_hook_handle": lambda: _divided()._pre_forward_hook_handle,
    "_philox_key_split": lambda: torch.ops.aten._philox_key_split,
    "_philox_uniform_": lambda: torch.ops.aten._philox_uniform_,
    "_pop_saved_tensors_default_hooks": lambda: torch._C._autograd._pop_saved_tensors_default_hooks,
    "_post_accumulate_grad_hooks": lambda: _WEIGHT._post_accumulate_grad_hooks,
    "_push_saved_tensors_default_hooks": lambda: torch._C._autograd._push_saved_tensors_default_hooks,
    "_replicate_for_data_parallel": lambda: nn.Linear(1, 1)._replicate_for_data_parallel,
    "_saved_dim0": lambda: _WEIGHT.mT.grad_fn._saved_dim0,
    "_saved_dim1": lambda: _WEIGHT.mT.grad_fn._saved_dim1,
    "_saved_dims": lambda: _WEIGHT.T.grad_fn._saved_dims,
    "_saved_scale_grad_by_freq": lambda: _OPERANDS["embedding"]._saved_scale_grad_by_freq,
    "_schema": lambda: torch.ops.aten.rand.default._schema,
    "_sequence_nr": lambda: _OPERANDS["linear"]._sequence_nr(),
    "_storage_Use_Count": lambda: torch._C._storage_Use_Count,
    "_top_saved_tensors_default_hooks": lambda: torch._C._autograd._top_saved_tensors_default_hooks(True),
    # By name only, at run time:
    "_raw_saved_self": lambda: _OPERANDS["linear"]._raw_saved_self,
    "_saved_padding_idx": lambda: _OPERANDS["embedding"]._saved_padding_idx,
}

MARKS = {
    "_dynamo_marked_constant",
    "_hop_name_to_variable_class",
    "_i_will_not_complain_if_bc_breaks_InstructionTranslator",
}
"""Looked up where they are used, with an answer where they are not there."""

PYTHON = {"_asdict", "_exit", "_fields", "_getframe", "_replace"}


# Torch's own, where Inductor is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("line", IMPORTS)
def test_an_import(line):
    exec(line, {})


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute(name):
    ATTRIBUTES[name]()


def test_the_lists_are_whole():
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {part for path in PACKAGE.rglob("*.py") for part in path.with_suffix("").parts}
    own |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    used = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    assert used - own - PYTHON - MARKS <= set(ATTRIBUTES)
    imported = {
        f"from {node.module} import {alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch._")
        for alias in node.names
    }
    imported |= {
        f"import {alias.name}"
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.startswith("torch") and "._" in alias.name
    }
    assert imported == set(IMPORTS)
