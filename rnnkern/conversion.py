"""Between torch.nn's recurrent modules and rnnkern's: the same Parameters in a module of the other kind."""

from collections.abc import Callable

from torch import nn

from rnnkern import modules
from rnnkern.options import PLAIN

# Each of torch.nn's classes and its counterpart here.
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNN: modules.RNN,
    nn.LSTMCell: modules.LSTMCell,
    nn.GRUCell: modules.GRUCell,
    nn.RNNCell: modules.RNNCell,
}
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
# What rnnkern's modules have beyond torch.nn's.
_OWN_ATTRIBUTES = ("backend", "options")


def convert(model: nn.Module) -> nn.Module:
    """Replaces every ``torch.nn`` LSTM, GRU, RNN and cell inside ``model`` by rnnkern's, in place.

    The new modules hold the very Parameters of the old (so an optimizer goes on working), their hooks, training mode
    and requires_grad. A module that occurs twice is replaced by one. Nothing is drawn from a random generator.

    Args:
        model: any module. Recurrent modules of rnnkern in it stay as they are.

    Returns:
        ``model``; a new module if ``model`` itself is one of torch.nn's recurrent modules.

    Raises:
        TypeError: a module inside is a subclass of torch.nn's that rnnkern cannot know. Nothing has been changed then.
        ValueError: a module's parameters are not torch.nn's (parametrised, pruned, the old weight_norm or
            spectral_norm): convert before such a change is made, or undo it first. Nothing has been changed then.
    """
    return _replace_all(model, COUNTERPARTS, _check_torch)


def to_torch(model: nn.Module) -> nn.Module:
    """Replaces every rnnkern module inside ``model`` by ``torch.nn``'s, in place: `convert` undone, for export,
    scripting or quantisation.

    Args, returns and errors as for :func:`convert`, with the two sides exchanged.

    Raises:
        ValueError: also for a module with an option that torch.nn lacks. Nothing has been changed then.
    """
    return _replace_all(model, {ours: theirs for theirs, ours in COUNTERPARTS.items()}, _check_own)


def _parameter_names(module: nn.Module) -> set[str]:
    """The parameters that torch.nn gives a module of these sizes."""
    if isinstance(module, nn.RNNBase):
        return {name for names in module._all_weights for name in names}
    return {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}


def _check_parameters(name: str, module: nn.Module) -> None:
    if nn.utils.parametrize.is_parametrized(module) or set(module._parameters) != _parameter_names(module):
        found = sorted(dict(module.named_parameters()))
        raise ValueError(
            f"{name}: expected the parameters of a plain {type(module).__name__}, got {found}: "
            "it is parametrised or pruned; remove that first, convert, and apply it again. Nothing was changed"
        )


def _check_torch(name: str, module: nn.Module) -> None:
    """Refuses what looks recurrent but is neither torch.nn's nor rnnkern's own class."""
    if isinstance(module, tuple(COUNTERPARTS.values())):
        return
    if "forward" in module.__dict__:
        raise TypeError(f"{name}: its forward has been replaced on the instance; undo that first. Nothing was changed")
    if type(module) not in COUNTERPARTS and not nn.utils.parametrize.is_parametrized(module):
        raise TypeError(
            f"{name}: {type(module).__module__}.{type(module).__qualname__} is a subclass of "
            f"torch.nn's {type(module).__mro__[1].__name__}, whose forward rnnkern does not "
            "know; replace it by hand. Nothing was changed"
        )
    _check_parameters(name, module)


def _check_options(name: str, module: nn.Module) -> None:
    """Refuses what torch.nn's modules cannot be asked for."""
    if isinstance(module, modules.LSTM | modules.GRU | modules.RNN) and module.options != PLAIN:
        raise ValueError(
            f"{name}: torch.nn.{type(module).__name__} has no {', '.join(module.options.changed())}; take that back "
            "first where the model can do without it (module.recompute = False). Nothing was changed"
        )


def _check_own(name: str, module: nn.Module) -> None:
    if isinstance(module, tuple(COUNTERPARTS.values())):
        if type(module) not in COUNTERPARTS.values() and not nn.utils.parametrize.is_parametrized(module):
            raise TypeError(
                f"{name}: {type(module).__qualname__} is a subclass of rnnkern's; "
                "replace it by hand. Nothing was changed"
            )
        _check_options(name, module)
        _check_parameters(name, module)


def _replace_all(
    model: nn.Module, to: dict[type[nn.Module], type[nn.Module]], check: Callable[[str, nn.Module], None]
) -> nn.Module:
    found = [
        (name or "the model itself", module) for name, module in model.named_modules() if isinstance(module, _RECURRENT)
    ]
    for name, module in found:
        check(name, module)
    replacement = {id(module): _rebuild(module, to[type(module)]) for _, module in found if type(module) in to}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacement:
                parent._modules[name] = replacement[id(child)]
    return replacement.get(id(model), model)


def _rebuild(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of `kind` with everything that `module` holds. Built on the meta device, so that it draws no random
    number."""
    sizes = (1, 1)
    new = kind(*sizes, device="meta")
    own = {name: getattr(new, name) for name in _OWN_ATTRIBUTES if hasattr(new, name)}
    state = {name: value for name, value in module.__dict__.items() if name not in _OWN_ATTRIBUTES}
    new.__dict__.clear()
    new.__dict__.update(state | own)
    if isinstance(new, nn.RNNBase) and isinstance(module, nn.RNNBase):
        new._init_flat_weights()
    return new
