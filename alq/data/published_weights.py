"""Published full-precision weights, for `resnet.py --DOWNLOAD`: taken instead of training."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import PurePosixPath
from urllib.error import URLError
from urllib.parse import urlparse

from torch import Tensor, hub, nn

from ..errors import InputError
from ..machine.processes import main_first


@main_first()
def fetch_weights(url: str) -> dict[str, Tensor]:
    """Return the state dict behind `url`, which is kept in torch.hub's folder.

    The file's name ends in the first digits of its SHA-256, `resnet18-f37072fd.pth`, as those of
    torchvision's weights do; torch.hub compares them.
    """
    name = PurePosixPath(urlparse(url).path).name
    if not hub.HASH_REGEX.search(name):
        raise InputError(
            f"--model_ori_urls {url}: the name must end in the first digits of the file's SHA-256, "
            "as in resnet18-f37072fd.pth; rename the file"
        )
    try:
        return hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (URLError, OSError, ValueError) as error:
        raise InputError(
            f"--model_ori_urls {url}: could not be fetched ({error}); put {name} into "
            f"{hub.get_dir()}/checkpoints"
        ) from error
    except (RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--model_ori_urls {url}: {reason}; delete {hub.get_dir()}/checkpoints/{name} "
            "if it is there and try again"
        ) from error


def load_fetched(model: nn.Module, fetched: dict, args: Namespace) -> None:
    """Put fetched weights into `model`; InputError if they are another network's.

    Other than a checkpoint of ours, published weights may lack entries that torch fills in, such
    as the `num_batches_tracked` of old files; so torch compares them.
    """
    try:
        model.load_state_dict(fetched)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"--model_ori_urls {args.model_ori_urls}: not the weights of --net {args.net}"
        ) from error
