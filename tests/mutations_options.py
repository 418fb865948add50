"""Defects of the options, outside the kernels, each to be seen by a test of them, which numba_mutant.py runs."""

from tests.mutations import Mutation


def seen_by(test: str, file: str, changes: dict[str, tuple[str, str]]) -> list[Mutation]:
    """Mutations of one file, {name: (old, new)}, for which one test must fail."""
    return [Mutation(name, file, *change, "fails", test) for name, change in changes.items()]


MODULES, RESETS = "tests/test_option_modules.py::", "tests/test_option_resets.py::"
PLANS = "tests/test_option_plans.py::"

OF_OPTIONS = [
    *seen_by(
        RESETS + "test_gradients_stop_at_the_border",
        "reference.py",
        {
            "options: gradient leaks over a reset": ("dh_prev = torch.where(drops, nothing, dh_prev)", "pass"),
        },
    ),
    *seen_by(
        RESETS + "test_a_reset_begins_an_episode_of_its_own",
        "reference.py",
        {
            "options: gradient of what is reset to goes on as that of the old state": (
                "torch.where(drops, dh_prev, nothing), nothing)",
                "torch.where(drops, nothing, dh_prev), nothing)",
            ),
            "options: a reset one step late": (
                "extras.reset[t].unsqueeze(1), _at(extras.reset_h",
                "extras.reset[t - 1].unsqueeze(1), _at(extras.reset_h",
            ),
        },
    ),
    *seen_by(
        RESETS + "test_a_reset_begins_an_episode_of_its_own",
        "views.py",
        {
            "options: states to reset to of one layer for all": ("s.select(-3, layer)", "s.select(-3, 0)"),
        },
    ),
    *seen_by(
        RESETS + "test_nothing_of_the_old_state_passes",
        "reference.py",
        {
            "options: a reset multiplies": (
                "h = torch.where(extras.reset[t].unsqueeze(1), _at(extras.reset_h, t, h), h)",
                "h = h * ~extras.reset[t].unsqueeze(1)",
            ),
        },
    ),
    *seen_by(
        RESETS + "test_forms_of_a_call",
        "views.py",
        {
            "options: a reset batch first is read time first": (
                "reset.t() if batch_first else reset",
                "reset.reshape(reset.shape[::-1] if batch_first else reset.shape)",
            ),
        },
    ),
    *seen_by(
        MODULES + "test_masks_of_a_call",
        "masks.py",
        {
            "options: a mask unscaled": ("to(like.dtype).mul_(scale)", "to(like.dtype)"),
            "options: kept and dropped exchanged": ("(words > last)", "(words <= last)"),
            "options: one mask for both directions": (
                "Masks(found[0], ",
                "Masks(None if found[0] is None else found[0][:1].expand_as(found[0]), ",
            ),
        },
    ),
    *seen_by(
        MODULES + "test_a_probability_of_one_drops_everything",
        "masks.py",
        {
            "options: a threshold that is no number of 16 bits": (
                "words <= last if",
                "words < last + 1 if",
            ),
        },
    ),
    *seen_by(
        MODULES + "test_nothing_is_drawn_without_need",
        "stack.py",
        {
            "options: masks in eval": ("if call.training and call.options != PLAIN", "if call.options != PLAIN"),
        },
    ),
    *seen_by(
        MODULES + "test_against_a_loop",
        "stack.py",
        {
            "options: masks of h and c exchanged": (
                "        drawn.zoneout_h,\n        drawn.zoneout_c,\n",
                "        drawn.zoneout_c,\n        drawn.zoneout_h,\n",
            ),
            "options: shares of h and c exchanged": (
                "            zone_h,\n            zone_c,\n",
                "            zone_c,\n            zone_h,\n",
            ),
        },
    ),
    *seen_by(
        MODULES + "test_against_a_loop",
        "reference_cells.py",
        {
            "options: old and new exchanged in zoneout": (
                "torch.where(self.mask, old, new)",
                "torch.where(self.mask, new, old)",
            ),
            "options: old and new exchanged in the shares of zoneout": (
                "self.share * old + (1 - self.share) * new",
                "(1 - self.share) * old + self.share * new",
            ),
            "options: statistics of LayerNorm over the batch": (
                "centred = x - x.mean(-1, keepdim=True)\n    return",
                "centred = x - x.mean(0, keepdim=True)\n    return",
            ),
        },
    ),
    *seen_by(
        "tests/test_option_parameters.py::test_parameters",
        "modules.py",
        {
            "options: LayerNorm's weights drawn": ('if name.startswith("ln_")', 'if name.startswith("none")'),
            "options: peepholes of the wrong names": ("own.append(name + suffix)", "own.append(name)"),
        },
    ),
    *seen_by(
        RESETS + "test_all_states",
        "stack.py",
        {
            "options: sequences of packed states not in their order": (
                "pad_packed_sequence(packed._replace(data=rows))",
                "pad_packed_sequence(packed._replace(data=rows, unsorted_indices=None))",
            ),
        },
    ),
    *seen_by(
        PLANS + "test_options",
        "planned.py",
        {
            "options: a plan that forgets zoneout in evaluation": (
                "shares = options.shares(form.spec, form.training)",
                "shares = (0.0, 0.0)",
            ),
            "options: a plan that draws when it is made": (
                "masks.draw(self.wanted[k], x, drawn, self.choose)",
                "masks.draw(self.wanted[k], x, choose=self.choose)",
            ),
            "options: a plan without dropout between layers": ("if k == 0 or not form.dropout", "if True"),
            "options: a plan without weight dropout": (
                "masks.drop_weights(self._named(own), found)",
                "self._named(own)",
            ),
        },
    ),
    *seen_by(
        PLANS + "test_resets",
        "planned.py",
        {
            "options: a plan that resets every layer to the first's": (
                "views.reset_states_of(reset_to, k)",
                "views.reset_states_of(reset_to, 0)",
            ),
        },
    ),
    *seen_by(
        PLANS + "test_all_states",
        "backends/numba_cpu/ahead.py",
        {
            "options: a plan that drops the gradient of c": (
                '"dcells": None if dcells is None else form.rows(dcells, x)',
                '"dcells": None',
            ),
        },
    ),
    *seen_by(
        "tests/test_option_errors.py::test_bad_call",
        "stack.py",
        {
            "options: reset_to without a reset ignored": (
                "    checks.reset_to_alone(stack.call.reset, stack.call.reset_to)\n",
                "",
            ),
        },
    ),
]
