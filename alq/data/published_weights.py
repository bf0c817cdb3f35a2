"""Published full-precision weights, for `resnet.py --DOWNLOAD`: taken instead of training."""

import pickle
from pathlib import PurePosixPath
from urllib.error import URLError
from urllib.parse import urlparse

from torch import Tensor, hub

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
        state = hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (URLError, OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"--model_ori_urls {url}: could not be fetched ({str(error).splitlines()[0]}); put an "
            f"intact {name} into {hub.get_dir()}/checkpoints, in the place of what is there"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(f"--model_ori_urls {url}: holds no state dict; give that of a network")
    return state
