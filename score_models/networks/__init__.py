"""Networks: any module (x, noise_level, cond) -> output shaped like x will do; these are ours."""

from score_models.networks.dit import DiT
from score_models.networks.mlp import MLP
from score_models.networks.score_unet import ScoreUNet
from score_models.networks.unet import UNet

__all__ = ["DiT", "MLP", "ScoreUNet", "UNet"]
