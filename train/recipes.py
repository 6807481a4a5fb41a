"""Named sets of options: `--recipe NAME` is what it stands for, written out.

A recipe only changes defaults. An option that is given besides it wins, and a run's config.json
holds every option, so that nothing depends on what a recipe's name will mean later.
"""

from __future__ import annotations

from dataclasses import replace

from mocapsnet.train.options import PRESETS, TrainOptions


def defaults(asked: TrainOptions) -> TrainOptions:
    """What the options are by default where `asked` names a recipe."""
    return {None: TrainOptions(), "published": published(asked)}[asked.recipe]


def published(asked: TrainOptions) -> TrainOptions:
    """What the published code of Momentum Capsule Networks does, github.com/moejoe95/MoCapsNet.

    docs/paper.md has what each option does. Sizes, epochs and learning rate are as they are without
    a recipe; what only some networks, routings or optimisers have is set for those alone.
    """
    given, plain = asked.model, TrainOptions()
    dense = given.name in ("mocapsnet", "rescapsnet", "capsnet")  # which that code has
    model = replace(plain.model, init="paper", grouping="pixels") if dense else plain.model
    if given.name in ("mocapsnet", "conv-mocapsnet"):
        model = replace(model, velocity="block")
    if given.name == "mocapsnet":
        model = replace(model, skip="twice")
    if given.method == "sda" and dense:
        model = replace(model, sda_mean="batch", sda_scale="published", bias=0.1)
    data = replace(plain.data, normalisation="fixed")
    if asked.data.pad != 0:
        data = replace(data, test_crop="random")
    optim = plain.optim
    if dense or (given.name == "conv-mocapsnet" and given.decoder is not None):
        optim = replace(optim, decoder_mask="prediction", reconstruction_target="normalised")
    if asked.optim.optimizer == "ranger21":  # it takes the batch size for the batches of an epoch
        batch_size = asked.optim.batch_size or PRESETS[asked.data.dataset].batch_size
        optim = replace(optim, planned_steps=batch_size)
    return replace(plain, model=model, data=data, optim=optim)
