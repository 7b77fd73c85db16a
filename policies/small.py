"""The robot's small network: FlowPolicy of 01 with eyes and a sentence. Only `encode` is new.

Its head is 01's; what it sees and reads becomes a few numbers more beside the state. SlotPolicy and
SmallImagePolicy are for two tasks of 05, PutOnPad and PixelGap.
"""

import importlib

import torch
from torch import nn

flow = importlib.import_module("01_flow_policy")


class RobotPolicy(flow.FlowPolicy):
    """FlowPolicy that may also see images, rgb (B, cameras, 3, h, w) uint8, and read a sentence,
    tokens (B, L) uint8, its bytes. Observations and actions may come from any device."""

    kind = "robot"

    def __init__(self, horizon, action_dim, state_dim, cameras=0, language=False, width=512,
                 depth=3, context=None):
        # 64 feature maps of a camera give two numbers each, a sentence gives 64
        self.context_dim = context or state_dim + 128 * cameras + 64 * language
        super().__init__(horizon, action_dim, self.context_dim, width, depth)
        # 01 made these as long as the head's input, the context; the state has its own length
        self.state_centre, self.state_scale = torch.zeros(state_dim), torch.ones(state_dim)
        self.cameras, self.language = cameras, language
        # rebuilds the policy from a checkpoint
        self.config = dict(kind=self.kind, horizon=horizon, action_dim=action_dim,
                           state_dim=state_dim, cameras=cameras, language=language, width=width,
                           depth=depth)
        if cameras:
            self.image_encoder = self.make_image_encoder()
        if language:  # a convolution that sees five bytes at a time, then the maximum
            self.byte_embedding = nn.Embedding(256, 32)
            self.sentence_encoder = nn.Conv1d(32, 64, 5, padding=2)

    def make_image_encoder(self):
        """One net, shared by the cameras."""
        return nn.Sequential(
            nn.Conv2d(3, 32, 7, stride=2), nn.SiLU(), nn.Conv2d(32, 32, 3, stride=2), nn.SiLU(),
            nn.Conv2d(32, 32, 3), nn.SiLU(), nn.Conv2d(32, 64, 3))

    def encode(self, obs):
        """obs -> ctx (B, C), everything about the observation that the velocity needs."""
        obs = {name: values.to(self.action_scale.device) for name, values in obs.items()}
        parts = [self.feel(obs)]
        if self.cameras:
            parts.append(self.look(obs["rgb"]))
        if self.language:
            parts.append(self.read(obs["tokens"]))
        return torch.cat(parts, dim=-1)

    def feel(self, obs):
        """The state, (B, S), in the units of the demonstrations."""
        return super().encode(obs)

    def look(self, rgb):
        """(B, cameras, 3, h, w) uint8 -> where the feature maps look, (B, 128 * cameras)."""
        return self.features(rgb.flatten(0, 1)).view(-1, 128 * self.cameras)

    def features(self, images):
        """(N, 3, h, w) uint8 -> (N, 128)."""
        images = images.float() / 255 - 0.5
        # half precision for the images; the head keeps 32 bits, RL compares close velocities
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            maps = self.image_encoder(images)                                # (N, 64, ..)
        return spatial_softmax(maps.float())

    def read(self, tokens):
        """(B, L) uint8 -> (B, 64). A batch has few different sentences: each is read once."""
        sentences, which = tokens.unique(dim=0, return_inverse=True)
        letters = self.byte_embedding(sentences.long()).transpose(1, 2)
        return self.sentence_encoder(letters).amax(-1)[which]

    def normalise(self, actions):
        return super().normalise(actions.to(self.action_scale.device))


def spatial_softmax(maps):
    """Feature maps (N, C, h, w) -> the point each looks at, x and y in [-1, 1]: (N, 2 C). A map
    becomes a probability over pixels, and its mean position the feature (Levine et al. 2016)."""
    height, width = maps.shape[2:]
    chance = maps.flatten(2).softmax(-1).view_as(maps)
    x, y = (torch.linspace(-1, 1, size, device=maps.device) for size in (width, height))
    return torch.cat([chance.sum(2) @ x, chance.sum(3) @ y], dim=-1)


class SmallImagePolicy(RobotPolicy):
    """For images of 16 x 16 pixels, the same one in many rows (05's PixelGap)."""

    kind = "small_images"

    def make_image_encoder(self):
        return nn.Sequential(nn.Conv2d(3, 32, 5), nn.SiLU(), nn.Conv2d(32, 64, 3))

    def features(self, images):
        images, which = images.unique(dim=0, return_inverse=True)  # each is encoded once
        return super().features(images)[which]


class SlotPolicy(RobotPolicy):
    """For a state that ends in the positions (m) of `slots` things which the sentence may name: it
    decides which of them are looked at (05's PutOnPad)."""

    kind = "slots"

    def __init__(self, horizon, action_dim, state_dim, slots, width=512, depth=3):
        # the state without the things, 64 of the sentence, four heads of attention with 3 each
        context = state_dim - 3 * slots + 64 + 4 * 3
        super().__init__(horizon, action_dim, state_dim, language=True, width=width, depth=depth,
                         context=context)
        self.slots = slots
        self.config = dict(kind=self.kind, horizon=horizon, action_dim=action_dim,
                           state_dim=state_dim, slots=slots, width=width, depth=depth)
        self.attention = nn.Linear(64, 4 * slots)

    def encode(self, obs):
        obs = {name: values.to(self.action_scale.device) for name, values in obs.items()}
        own, things = self.feel(obs), obs["state"][:, -3 * self.slots:]
        text = self.read(obs["tokens"])                                      # (B, 64)
        weights = self.attention(text).view(-1, 4, self.slots).softmax(-1)
        places = weights @ things.view(-1, self.slots, 3)                    # (B, 4, 3)
        # in decimetres, numbers of order 1
        return torch.cat([own[:, :-3 * self.slots], text, 10 * places.flatten(1)], dim=-1)
