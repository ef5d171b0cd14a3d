"""Whether the weights that a job names can be had, checked by the driver before any work.

Owns: the checks, and the form of the message about a failed download. Does not own: loading weights (`classifier`), or
the addresses of published ones (`backbones`).
"""

import re
import urllib.error
import urllib.request
from collections.abc import Iterable

from mnist_dist.config import ModelConfig
from mnist_dist.errors import BundleError, WeightsError, first_line, suggestion
from mnist_dist.models.backbones import backbone_size_px, find_backbone, keras_models_folder, published_weights_url
from mnist_dist.models.bundle import BUNDLE_FILE, read_bundle_info
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.surroundings import what_is_there

NAMED_WEIGHTS = IMAGENET, NONE = ("imagenet", "none")
FILE_SUFFIXES = (".h5", ".hdf5")
ALLOWED = (
    f"Allowed are {IMAGENET}, {NONE}, a .weights.h5 file (keras.Model.save_weights of the network without its top) or "
    "the folder of a bundle"
)
ANSWER_S = 5.0
"""How long the server of published weights may take to connect, and to answer, s."""
_REASON = re.compile(r"URL fetch failure on \S+: (None -- )?(?P<reason>.+)", re.DOTALL)


def check_weights(weights: str, *, backbone: str) -> None:
    """Checks that weights given by a path or URI are there.

    Args:
        weights: `imagenet`, `none`, or the path or URI of a file or a bundle.
        backbone: the backbone's name, for messages.

    Raises:
        WeightsError: there is no such file or bundle; the message says what is there.
    """
    if weights in NAMED_WEIGHTS:
        return
    if not ANYWHERE.exists(weights):
        raise WeightsError(
            f"the weights for {backbone} are no file or bundle{suggestion(weights, NAMED_WEIGHTS)}"
            f"{what_is_there(weights)}. {ALLOWED}. Received: weights={weights!r}"
        )
    if not weights.endswith(FILE_SUFFIXES):
        try:
            read_bundle_info(weights)
        except BundleError as err:
            raise WeightsError(
                f"the weights for {backbone} are neither a .h5 file nor a bundle (a folder with {BUNDLE_FILE}): {err}"
            ) from err


def _name_of(uri: str) -> str:
    return uri.rpartition("/")[2]


def check_published_weights(models: Iterable[ModelConfig]) -> None:
    """Checks that the ImageNet weights of models are in this machine's cache, or that their server answers.

    Raises:
        WeightsError: neither; the message says which file to put where.
    """
    for url, config in {_url_of(config): config for config in models if config.weights == IMAGENET}.items():
        problem = published_weights_problem(url)
        if problem:
            raise download_error(config, problem)


def published_weights_problem(url: str) -> str:
    """Why published weights can be had neither from the cache nor from their server; empty: they can."""
    if (keras_models_folder() / _name_of(url)).is_file():
        return ""
    try:
        urllib.request.urlopen(url, timeout=ANSWER_S).close()  # Not HEAD, which some proxies refuse.
    except urllib.error.URLError as err:
        return first_line(err) if isinstance(err, urllib.error.HTTPError) else str(err.reason)
    except OSError as err:
        return first_line(err)
    return ""


def download_error(config: ModelConfig, reason: Exception | str) -> WeightsError:
    """The error of a model whose ImageNet weights cannot be downloaded; names the URL once.

    Args:
        config: the model.
        reason: why; an error of Keras names the URL, too, which is left out.
    """
    url = _url_of(config)
    of_keras = _REASON.match(str(reason))
    return WeightsError(
        f"cannot download the ImageNet weights of {config.backbone} ({of_keras['reason'] if of_keras else reason}). "
        f"Without a network, put the file {_name_of(url)} from {url} into {keras_models_folder()}, "
        f"or set weights to a file, a bundle or none. Received: weights={IMAGENET!r}"
    )


def _url_of(config: ModelConfig) -> str:
    return published_weights_url(
        find_backbone(config.backbone), alpha=config.alpha, image_size_px=backbone_size_px(config)
    )
