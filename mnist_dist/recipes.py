"""Named training jobs and searches. Each docstring states the command and the result to expect.

A recipe is a starting point: a flag can override every field. `RECIPE_INFOS` says what each needs, for help texts and
for `commands/recipe_choice.py`, which picks the recipe that fits the data.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from mnist_dist.config import DataConfig, FitConfig, ModelConfig, OptimizerConfig, PhasesConfig, RunConfig, TrainJob
from mnist_dist.distributions import Choice
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchSpace

RecipeData = Literal["included", "mnist", "small images", "images"]


@dataclass(frozen=True, kw_only=True)
class RecipeInfo:
    """What a recipe is, in a line for help texts, and which data it is made for."""

    summary: str
    """At most 60 characters."""
    data: RecipeData
    """`included` and `mnist` name their data themselves, `small images` and `images` need `--data`. All but `images`
    are for images of at most 64 px."""
    takes: str = ""
    """How long it takes on two cores, in words; empty: not measured, or it depends on the data."""

    @property
    def needs(self) -> str:
        """What to give it, in words."""
        return _NEEDS[self.data]


_NEEDS: dict[RecipeData, str] = {
    "included": "nothing",
    "mnist": "MNIST (--data-dir)",
    "small images": "images of up to 64 px (--data)",
    "images": "images (--data)",
}


def quickstart() -> TrainJob:
    """python -m jobs.train quickstart: the small CNN on scikit-learn's digits, two workers. Expect 96 to 98 % in
    about half a minute."""
    return TrainJob(
        model=ModelConfig(backbone="cnn"),
        phases=PhasesConfig(epochs=(15,)),
        fit=FitConfig(batch_size=64),
        run=RunConfig(workers=2, cpus_per_worker=0.5),
    )


def _averaged(backbone: str, *, epochs: int, dropout: float | None = None) -> TrainJob:
    """A small network on MNIST with augmentation, a learning rate that falls to 0, and an average of the weights."""
    return TrainJob(
        data=DataConfig(data=("mnist",), validation_fraction=0.05),
        model=ModelConfig(backbone=backbone, dropout=dropout),
        phases=PhasesConfig(epochs=(epochs,), learning_rate=(2e-3,)),
        optimizer=OptimizerConfig(schedule="cosine", warmup_steps=200, ema_decay=0.999),
        fit=FitConfig(augmentation="digits"),
    )


def mnist_mlp() -> TrainJob:
    """python -m jobs.train mnist-mlp --data-dir IDX_FOLDER: 784-128-64-10. Expect 99.0 % (published: 98.23 %)."""
    return _averaged("mlp", epochs=60)


def mnist_cnn() -> TrainJob:
    """python -m jobs.train mnist-cnn --data-dir IDX_FOLDER: two convolutions, 421,642 parameters. Expect 99.5 %
    (published: 99.07 %)."""
    return _averaged("cnn", epochs=20, dropout=0.3)


def mnist_cnn_bn() -> TrainJob:
    """python -m jobs.train mnist-cnn-bn --data-dir IDX_FOLDER: three convolutions with BatchNorm, 459,210 parameters.
    Expect 99.6 %, loss 0.014, within 5 minutes on 2 cores (published: 99.2 %, loss 0.03)."""
    job = _averaged("cnn_bn", epochs=18)
    return replace(job, fit=replace(job.fit, best_metric="val_accuracy"))


def mnist_vgg16() -> TrainJob:
    """python -m jobs.train mnist-vgg16 --data-dir IDX_FOLDER: frozen VGG16 at 224 px with a dense softmax on its
    7 x 7 x 512 outputs, which are computed once. Expect 99.3 % in about an hour on 2 cores, 98.9 % with 11,000 training
    digits (--limit 11600)."""
    return TrainJob(
        data=DataConfig(data=("mnist",), validation_fraction=0.05),
        model=ModelConfig(backbone="vgg16", weights="imagenet", pooling="flatten"),
        phases=PhasesConfig(epochs=(20,), learning_rate=(1e-4,), trainable=("head",)),
    )


def mnist_vgg16_finetune() -> TrainJob:
    """python -m jobs.train mnist-vgg16-finetune --data-dir IDX_FOLDER: VGG16 at 224 px on GPUs: first the
    head, then also blocks 4 and 5."""
    return replace(
        mnist_vgg16(),
        model=ModelConfig(backbone="vgg16", weights="imagenet", hidden_units=256, dropout=0.5),
        phases=PhasesConfig(epochs=(5, 5), learning_rate=(1e-3, 1e-5), trainable=("head", "block4")),
    )


def mnist_mobilenet_v2() -> TrainJob:
    """python -m jobs.train mnist-mobilenet-v2 --data-dir IDX_FOLDER: MobileNetV2 at 32 px as published: 10 epochs
    of the head, then 5 of all but the first 100 layers at 1e-5 (published: 84.13 %, loss 0.56)."""
    return TrainJob(
        data=DataConfig(data=("mnist",), validation_fraction=0.05),
        model=ModelConfig(backbone="mobilenet_v2", weights="imagenet", image_size_px=32),
        phases=PhasesConfig(epochs=(10, 5), learning_rate=(1e-3, 1e-5), trainable=("head", "100")),
        fit=FitConfig(batch_size=32),  # BatchNorm's averages move by a thousandth per step, so it takes many steps.
    )


def mnist_mobilenet_v2_tuned() -> TrainJob:
    """python -m jobs.train mnist-mobilenet-v2-tuned --data-dir IDX_FOLDER: the same network and size, all layers
    trained, with augmentation and an average of the weights. Expect 99.6 %."""
    return replace(
        mnist_mobilenet_v2(),
        phases=PhasesConfig(epochs=(1, 14), learning_rate=(1e-3, 1e-3), trainable=("head", "all")),
        optimizer=OptimizerConfig(schedule="cosine", warmup_steps=200, ema_decay=0.999),
        fit=FitConfig(augmentation="digits"),
    )


def mnist_conv_base() -> TrainJob:
    """python -m jobs.train mnist-conv-base --data-dir IDX_FOLDER: three convolutions, trained on half of MNIST, for
    `mnist-conv-transfer`."""
    job = _averaged("conv_base", epochs=20)
    return replace(job, data=replace(job.data, limit=30_000), run=RunConfig(name="mnist-conv-base"))


def mnist_conv_transfer() -> TrainJob:
    """python -m jobs.train mnist-conv-transfer --data-dir IDX_FOLDER: the convolutions of `mnist-conv-base`, frozen,
    under a new head trained on the other half of MNIST. Expect 99.5 % (published: over 99 %)."""
    job = _averaged("conv_base", epochs=20)
    return replace(
        job,
        data=replace(job.data, skip=30_000),
        model=ModelConfig(backbone="conv_base", weights="runs/mnist-conv-base/bundle"),
        phases=replace(job.phases, trainable=("head",)),
    )


def folder_cnn_bn() -> TrainJob:
    """python -m jobs.train folder-cnn-bn --data FOLDER: three convolutions with BatchNorm, trained from scratch
    on small images at their own size, in grey or colour. Expect 98 % with 2,400 digits of MNIST to train on."""
    return TrainJob(
        model=ModelConfig(backbone="cnn_bn"),
        phases=PhasesConfig(epochs=(30,)),
        fit=FitConfig(batch_size=64, augmentation="digits", early_stopping_patience=8, plateau_patience=3),
    )


def folder_mobilenet_v2() -> TrainJob:
    """python -m jobs.train folder-mobilenet-v2 --data FOLDER: MobileNetV2 at 224 px with ImageNet weights: first
    the head, then the last blocks."""
    return TrainJob(
        model=ModelConfig(backbone="mobilenet_v2", weights="imagenet", dropout=0.2),
        phases=PhasesConfig(epochs=(5, 5), learning_rate=(1e-3, 1e-5), trainable=("head", "100")),
        fit=FitConfig(batch_size=32, augmentation="photos", early_stopping_patience=3),
    )


def folder_vgg16() -> TrainJob:
    """python -m jobs.train folder-vgg16 --data FOLDER: VGG16 at 224 px with ImageNet weights: first the head, then the
    last block."""
    return replace(
        folder_mobilenet_v2(),
        model=ModelConfig(backbone="vgg16", weights="imagenet", hidden_units=256, dropout=0.5),
        phases=PhasesConfig(epochs=(5, 5), learning_rate=(1e-3, 1e-5), trainable=("head", "block5")),
    )


def folder_fine_tune() -> TrainJob:
    """python -m jobs.train folder-fine-tune --data FOLDER --backbone densenet121: any backbone with ImageNet weights,
    at its native size: first the head, then all layers."""
    return replace(
        folder_mobilenet_v2(),
        model=ModelConfig(backbone="resnet50", weights="imagenet", dropout=0.2),
        phases=PhasesConfig(epochs=(5, 5), learning_rate=(1e-3, 1e-5), trainable=("head", "all")),
    )


def folder_head() -> TrainJob:
    """python -m jobs.train folder-head --data FOLDER --backbone BUNDLE: a new head on the features of an imported
    backbone, which are computed once."""
    return TrainJob(
        model=ModelConfig(dropout=0.2),
        phases=PhasesConfig(epochs=(20,), trainable=("head",)),
        fit=FitConfig(batch_size=32, early_stopping_patience=3),
    )


TRAINING_RECIPES: dict[str, Callable[[], TrainJob]] = {
    "quickstart": quickstart,
    "mnist-mlp": mnist_mlp,
    "mnist-cnn": mnist_cnn,
    "mnist-cnn-bn": mnist_cnn_bn,
    "mnist-vgg16": mnist_vgg16,
    "mnist-vgg16-finetune": mnist_vgg16_finetune,
    "mnist-mobilenet-v2": mnist_mobilenet_v2,
    "mnist-mobilenet-v2-tuned": mnist_mobilenet_v2_tuned,
    "mnist-conv-base": mnist_conv_base,
    "mnist-conv-transfer": mnist_conv_transfer,
    "folder-cnn-bn": folder_cnn_bn,
    "folder-mobilenet-v2": folder_mobilenet_v2,
    "folder-vgg16": folder_vgg16,
    "folder-fine-tune": folder_fine_tune,
    "folder-head": folder_head,
}


def search_digits() -> SearchJob:
    """python -m jobs.search search-digits: eight trials of `mlp` and `cnn` on scikit-learn's digits. Expect 96 to 99 %
    in about a minute."""
    return SearchJob(
        space=SearchSpace(
            backbones=(
                BackboneSpace(backbone="mlp", trained=("all",)),
                BackboneSpace(backbone="cnn", trained=("all",)),
            ),
            hidden_units=(0,),
            learning_rate=(5e-4, 1e-2),
            batch_size=(32, 64),
        ),
        search=SearchConfig(trials=8, trial_epochs=6, finalists=2, finalist_epochs=12),
    )


def search_mnist() -> SearchJob:
    """python -m jobs.search search-mnist --data-dir IDX_FOLDER: 30 trials of three small networks trained whole and of
    new heads on MobileNetV2 and VGG16 (ImageNet weights, frozen)."""
    return SearchJob(
        data=DataConfig(data=("mnist",), validation_fraction=0.1),
        space=SearchSpace(
            backbones=(
                BackboneSpace(backbone="mlp", trained=("all",)),
                BackboneSpace(backbone="cnn", trained=("all",)),
                BackboneSpace(backbone="cnn_bn", trained=("all",)),
                BackboneSpace(
                    backbone="mobilenet_v2",
                    weights="imagenet",
                    image_size_px=(64, 96),
                    trained=("fine-tune",),
                    cut_points=("block13", "all"),
                ),
                BackboneSpace(backbone="vgg16", weights="imagenet", image_size_px=(64,), pooling=("avg", "flatten")),
            ),
            augmentation=("digits", "none"),
        ),
    )


def mnist_ensemble() -> SearchJob:
    """python -m jobs.search mnist-ensemble --data-dir IDX_FOLDER: `mnist-cnn-bn` from five seeds, as one model that
    gives the mean of their probabilities. Expect 99.7 %, loss 0.010, in 25 minutes on 2 cores."""
    job, seeds = mnist_cnn_bn(), (0, 1, 2, 3, 4)
    settings = {name: getattr(job.optimizer, name) for name in ("schedule", "warmup_steps", "ema_decay")}
    drawn = {"learning_rate": job.phases.learning_rate[0], **settings}
    return SearchJob(
        data=job.data,
        space=SearchSpace(
            backbones=(BackboneSpace(backbone="cnn_bn", trained=("all",)),),
            hidden_units=(0,),
            dropout=(0.5,),
            optimizer=("adam",),
            label_smoothing=(0.0,),
            augmentation=("digits",),
            batch_size=(job.fit.global_batch,),
            drawn={"seed": Choice(seeds), **{name: Choice((value,)) for name, value in drawn.items()}},
        ),
        search=SearchConfig(
            algorithm="grid",
            scheduler="none",
            trials=len(seeds),
            trial_epochs=1,
            finalists=len(seeds),
            finalist_epochs=job.phases.epochs[0],
            combine="ensemble",
        ),
    )


def search_vgg16_head() -> SearchJob:
    """python -m jobs.search search-vgg16-head --data-dir IDX_FOLDER: 100 heads on VGG16's features at 224 px, which
    are computed once."""
    return SearchJob(
        data=DataConfig(data=("mnist",), validation_fraction=0.1),
        space=SearchSpace(
            backbones=(BackboneSpace(backbone="vgg16", weights="imagenet", pooling=("avg",)),),
            hidden_units=(0, 64, 128, 256, 512),
        ),
        search=SearchConfig(trials=100, trial_epochs=15, finalists=1),
    )


def search_backbones() -> SearchJob:
    """python -m jobs.search search-backbones --data s3://bucket/images --storage s3://bucket/runs --workers 4: eight
    backbones with ImageNet weights on a folder of images, first heads, then the best five fine-tuned; on GPUs."""
    cut_points: dict[str, tuple[str, ...]] = {
        "mobilenet_v2": ("block13", "block6", "all"),
        "mobilenet_v3_small": ("block8", "all"),
        "vgg16": ("block5", "block4"),
        "resnet50": ("stage5", "stage4", "all"),
        "densenet121": ("stage5", "all"),
        "efficientnet_v2_b0": ("block6", "all"),
        "convnext_tiny": ("stage3", "all"),
        "xception": ("block13", "all"),
    }
    backbones = [
        BackboneSpace(backbone=name, weights="imagenet", trained=("fine-tune",), cut_points=points)
        for name, points in cut_points.items()
    ]
    backbones[0] = replace(backbones[0], alpha=(0.5, 1.0, 1.4), image_size_px=(160, 224))
    return SearchJob(
        space=SearchSpace(backbones=tuple(backbones), hidden_units=(0, 128, 256, 512)),
        search=SearchConfig(trials=300, trial_epochs=20, finalists=5, fine_tune_epochs=10),
    )


SEARCH_RECIPES: dict[str, Callable[[], SearchJob]] = {
    "search-digits": search_digits,
    "search-mnist": search_mnist,
    "mnist-ensemble": mnist_ensemble,
    "search-vgg16-head": search_vgg16_head,
    "search-backbones": search_backbones,
}

RECIPE_INFOS: dict[str, RecipeInfo] = {
    "quickstart": RecipeInfo(summary="small CNN on the included digits, two workers", data="included", takes="30 s"),
    "mnist-mlp": RecipeInfo(summary="784-128-64-10, 99.0 %", data="mnist", takes="70 s"),
    "mnist-cnn": RecipeInfo(summary="two convolutions, 99.5 %", data="mnist", takes="3 min"),
    "mnist-cnn-bn": RecipeInfo(summary="three convolutions with BatchNorm, 99.6 %", data="mnist", takes="4.5 min"),
    "mnist-vgg16": RecipeInfo(summary="VGG16 at 224 px, frozen, with a new head, 99.3 %", data="mnist", takes="60 min"),
    "mnist-vgg16-finetune": RecipeInfo(summary="VGG16 at 224 px: head, then blocks 4 and 5; for GPUs", data="mnist"),
    "mnist-mobilenet-v2": RecipeInfo(summary="MobileNetV2 at 32 px as published: head, then the rest", data="mnist"),
    "mnist-mobilenet-v2-tuned": RecipeInfo(summary="MobileNetV2 at 32 px, all layers, augmented", data="mnist"),
    "mnist-conv-base": RecipeInfo(summary="three convolutions, trained on half of MNIST", data="mnist"),
    "mnist-conv-transfer": RecipeInfo(summary="a new head on mnist-conv-base, on the other half", data="mnist"),
    "folder-cnn-bn": RecipeInfo(summary="small images: three convolutions, from scratch", data="small images"),
    "folder-mobilenet-v2": RecipeInfo(summary="photographs: MobileNetV2, head, then the last blocks", data="images"),
    "folder-vgg16": RecipeInfo(summary="photographs: VGG16, head, then the last block", data="images"),
    "folder-fine-tune": RecipeInfo(summary="photographs: any --backbone, head, then all layers", data="images"),
    "folder-head": RecipeInfo(summary="a new head on an imported bundle (--backbone)", data="images"),
    "search-digits": RecipeInfo(summary="8 trials of small networks on the included digits", data="included"),
    "search-mnist": RecipeInfo(summary="30 trials of small and pretrained networks", data="mnist"),
    "mnist-ensemble": RecipeInfo(summary="mnist-cnn-bn five times as one model, 99.7 %", data="mnist", takes="25 min"),
    "search-vgg16-head": RecipeInfo(summary="100 heads on VGG16's features at 224 px", data="mnist"),
    "search-backbones": RecipeInfo(summary="photographs: 300 trials, eight backbones; for GPUs", data="images"),
}
"""By the names of all recipes, of trainings and searches."""
