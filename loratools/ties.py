"""What becomes of tensors that are one in the model, or in its file: alike they stay so, else `--untie` writes each.

Which are tied a model's config and its family tell (`families`), which share a tensor its pickle (`torchfile`).
"""

from __future__ import annotations

from loratools.checkpoint import Checkpoint
from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.rows import Rows
from loratools.errors import UnsupportedError
from loratools.plan import Applications, Plan
from loratools.refs import same_bytes


def tie(plan: Plan, checkpoint: Checkpoint, tied: tuple[str, str], untie: bool) -> None:
    """Decide a tied embedding and head: alike they stay tied, else it takes `--untie`, which writes both."""
    embedding, head = tied
    _follow(plan, tied)
    here = [name for name in tied if name in plan.changes]
    if not here:
        return
    _share_saved(plan, tied)
    if len(here) == 2 and _alike(plan.changes[embedding], plan.changes[head]):
        if head not in checkpoint:
            plan.without_effect += len(plan.changes.pop(head))
            plan.notes.append(f"{head} stays tied to {embedding}: the adapter changes both alike")
        return
    how = f"{here[0]} alone" if len(here) == 1 else "each in a way of its own"
    if embedding.endswith("shared.weight"):
        raise UnsupportedError(
            f"{embedding} is the embedding of encoder and decoder and, as {head}, the head, and the adapter changes {how}",
            file=checkpoint.path, tensor=here[0], remedy="peft's own forward does not apply that either",
        )  # fmt: skip
    if not untie:
        raise UnsupportedError(
            f"{embedding} and {head} are one tensor in this model, and the adapter changes {how}",
            file=checkpoint.path, tensor=here[0], remedy="give --untie to write both",
        )  # fmt: skip
    plan.config["tie_word_embeddings"] = False
    plan.notes.append(f"untied: {head} is written beside {embedding}")
    bias = head.removesuffix("weight") + "bias"
    # the flag that ties the weights ties the decoder's bias of BERT and its kin to their head's, too
    for name, source in ((head, embedding), (bias, bias.replace("decoder.bias", "bias"))):
        if name not in checkpoint and source in checkpoint and name != source:
            plan.sources[name] = source
            plan.changes.setdefault(name, [])


def check_shared(plan: Plan, checkpoint: Checkpoint, untie: bool) -> None:
    """Names of one tensor in a pickle are changed alike, or `--untie` makes them tensors of their own."""
    for names in checkpoint.shared:
        here = [name for name in names if name in plan.changes]
        if here and not untie and not all(name in here and _alike(plan.changes[here[0]], plan.changes[name]) for name in names):
            raise UnsupportedError(
                f"one tensor in the base's file under the names {', '.join(names)}, and the adapter changes {', '.join(here)}",
                file=checkpoint.path, tensor=here[0], remedy="give --untie to make each a tensor of its own",
            )  # fmt: skip


def _share_saved(plan: Plan, tied: tuple[str, str]) -> None:
    """Where one of the two is adapted on top of a saved tensor, the other one's base is that tensor too: they are tied."""
    for name, other in (tied, tied[::-1]):
        for delta, strength in plan.changes.get(name, ())[:1]:
            if not isinstance(delta, Chain) or not isinstance(delta.first, Replacement):
                continue
            if other not in plan.changes:
                plan.changes[other] = [(delta.first, strength)]
                plan.expected += 1
            elif not replaces(plan.changes[other][0][0]):
                then, theirs = plan.changes[other][0]
                plan.changes[other][0] = (Chain(first=delta.first, then=then), theirs)


def _follow(plan: Plan, tied: tuple[str, str]) -> None:
    """What changes a tied embedding as one table with its head changes the head too, after what was saved of it."""
    embedding, head = tied
    following = [(found, strength) for delta, strength in plan.changes.get(embedding, ()) if (found := _following(delta))]
    there = plan.changes.get(head, [])
    if not following or any(_following(delta) for delta, _ in there):
        return
    if len(there) == len(following) == len(plan.changes[embedding]) == 1 and replaces(there[0][0]):
        plan.changes[head] = [(Chain(first=there[0][0], then=following[0][0]), following[0][1])]
    elif not all(isinstance(delta, Additive) for delta, _ in there):
        raise UnsupportedError(f"trained rows of {embedding} are also those of {head}, which is changed in another way", tensor=head)
    else:  # a difference is added to the rows as to the others
        plan.changes[head] = [*following, *there]
        plan.expected += len(following)


def _following(delta: Delta) -> Delta | None:
    """A change of an embedding that is its tied head's too, apart from a saved tensor beneath it."""
    inner = delta.then if isinstance(delta, Chain) else delta
    return inner if inner.follows_tie else None


def _alike(one: Applications, other: Applications) -> bool:
    if len(one) != len(other):
        return False
    return all(s == t and _same(d, e) for (d, s), (e, t) in zip(one, other, strict=True))


def _same(one: Delta, other: Delta) -> bool:
    """Whether two deltas make the same of the same weight: whole tensors with equal bytes, factors with equal bytes and scaling."""
    if isinstance(one, Replacement) and isinstance(other, Replacement):
        return same_bytes(one.value, other.value)
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return one.scaling == other.scaling and same_bytes(one.A, other.A) and same_bytes(one.B, other.B)
    if isinstance(one, DoRA) and isinstance(other, DoRA):
        return one.axis == other.axis and _same(one.direction, other.direction) and same_bytes(one.magnitude, other.magnitude)
    if isinstance(one, Rows) and isinstance(other, Rows):
        return one.indices == other.indices and same_bytes(one.values, other.values)
    if isinstance(one, Chain) and isinstance(other, Chain):
        return _same(one.first, other.first) and _same(one.then, other.then)
    return False


def replaces(delta: Delta) -> bool:
    """Whether nothing of the base's own tensor is left."""
    return isinstance(delta, Replacement) or (isinstance(delta, Chain) and replaces(delta.first))
