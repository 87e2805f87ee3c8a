"""Hooks that were set on an attention module before its swap: those on its calls go on, the others are named."""

from __future__ import annotations

from torch import nn

from hypermlp.integrations.swap_report import Left

# where torch.nn.Module keeps hooks on its calls; and how they are called
_CALL_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CALLED_HOW = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_FULL = "_is_full_backward_hook"
# and those on what a replacement has none of: the host's weights
_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def share_hooks(module: nn.Module, replacement: nn.Module) -> bool:
    """Let hooks on the calls of one module be those of another; False where that has hooks of its own.

    Both hold the same dictionaries, so that a handle removes from both, and what is set on one is on the other.
    """
    if any(getattr(replacement, name) for name in _CALL_HOOKS):
        return False
    for name in (*_CALL_HOOKS, *_CALLED_HOW, _FULL):
        setattr(replacement, name, getattr(module, name))
    return True


def return_hooks(replacement: nn.Module, module: nn.Module) -> None:
    """Where the two share their hooks, those set on ``replacement`` since go on as they are."""
    if replacement._forward_hooks is module._forward_hooks:
        setattr(module, _FULL, getattr(replacement, _FULL))


def hooks_left(module: nn.Module, name: str, replacement: nn.Module, *, shared: bool) -> list[Left]:
    """What is not called while ``replacement``, which may keep parts, stands for the module called ``name``."""
    found = []
    kept = set(replacement.modules())
    for inner, part in module.named_modules():
        if part in kept:
            continue
        kinds = []
        if any(getattr(part, hooks) for hooks in _CALL_HOOKS) and not (shared and part is module):
            kinds.append("on its calls")
        if any(getattr(part, hooks) for hooks in _STATE_HOOKS):
            kinds.append("on its state dict")
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in part.parameters(recurse=False)):
            kinds.append("on its parameters")
        if kinds:
            full_name = f"{name}.{inner}" if inner else name
            found.append(Left(full_name, type(part).__name__, f"hooks {', '.join(kinds)}"))
    return found
