"""pi0, a vision-language-action model, as a policy of this repo: what 01 to 03 ask of one, no more.

    encode(obs) -> ctx       images and sentence through the vision-language part, once
    velocity(x_t, t, ctx)    one pass of the action expert, which reads what that part's layers keep
    denormalise(x_0)         flow units -> the robot's actions
    fit_normalisation, normalise, config       as FlowPolicy has them: for SFT, and for checkpoints

The network and its weights are Hugging Face's (`PI0ForConditionalGeneration` of transformers); its
time and sign are ours: t = 1 is noise, v = noise - actions (Black et al. 2024). Images are fitted
into the square that the network wants and scaled to [-1, 1], the sentence goes through the folder's
own tokenizer or another's. The state and the actions are padded with zeros to the network's width;
what is padded takes part in the flow, as in pi0, but earns no credit (`credited`).

Nothing imports transformers before a policy is made.
"""

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from policies.pi0_files import load, look


def is_frozen(name, train):
    """Whether a parameter stays as it is: the vision-language part's, and word embeddings of the
    action expert, 0.26 billion numbers that it never reads."""
    return ".dit.embed_tokens." in name or (train == "expert" and ".vlm." in name)


def memory(config, train, rows):
    """Expected gigabytes, from the config alone: frozen parameters take 2 bytes, trained ones 24
    (policy, acting policy, SFT policy, gradient, Adam's two); the keys and values of a batch's rows
    with two cameras 2 a number, 4 if they are trained. One pass of a micro-batch comes on top."""
    from transformers import PI0ForConditionalGeneration
    with torch.device("meta"):
        model = PI0ForConditionalGeneration(config)
    sizes = {False: 0, True: 0}
    for name, p in model.named_parameters():
        sizes[is_frozen(name, train)] += p.numel()
    text, vision = config.vlm_config.text_config, config.vlm_config.vision_config
    tokens = 2 * (vision.image_size // vision.patch_size) ** 2 + 48
    width = text.num_key_value_heads * text.head_dim
    bytes_each = 2 * (2 if train == "expert" else 4)   # a key and a value
    return {"frozen": 2 * sizes[True] / 1e9, "trained": 24 * sizes[False] / 1e9,
            "kept": rows * bytes_each * text.num_hidden_layers * width * tokens / 1e9}


def tell_ahead(config, rows):
    """Prints that, and where its statistics are from, before any weight is loaded. config: that of
    a PI0Policy."""
    network, _, _, told = look(config)
    parts = memory(network, config["train"], rows)
    print("expected memory: {frozen:.1f} GB of frozen weights, {trained:.1f} of trained ones, "
          "{kept:.1f} of a batch's keys and values; a pass comes on top".format(**parts))
    print(told, flush=True)


class PI0Policy(nn.Module):
    """pi0 from a folder or a hub's name, for actions (H, action_dim). tokenizer: another such, if
    there is none in the folder.

    train: "expert" (the action expert learns; the vision-language part is frozen in bfloat16 and
    shared by all copies of the policy) or "all". state_dict holds what is trained, no more.
    micro_batch: rows that are in the network at a time, whatever the size of a batch; what a batch
    keeps of all its rows are the keys and values of images and sentence.
    """

    kind = "pi0"

    def __init__(self, folder, horizon, action_dim, state_dim, train="expert", micro_batch=32,
                 tokenizer=None):
        super().__init__()
        self.config = dict(kind=self.kind, folder=str(folder), horizon=horizon,
                           action_dim=action_dim, state_dim=state_dim, train=train,
                           tokenizer=tokenizer and str(tokenizer))
        _, self.tokenizer, self.known, _ = look(self.config)
        self.model = load(folder, "PI0ForConditionalGeneration").float()
        config = self.model.config
        config.chunk_size = self.horizon = horizon  # no weight depends on it
        self.action_dim, self.micro_batch = config.max_action_dim, micro_batch
        for name, p in self.named_parameters():
            if is_frozen(name, train):
                p.requires_grad_(False)
                p.data = p.data.bfloat16()
        for name, size in (("state", config.max_state_dim), ("action", config.max_action_dim)):
            self.register_buffer(f"{name}_centre", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.zeros(size))  # 0: padded
        for name, (mean, std) in self.known.items():
            self.set_normalisation(name, mean, std)

    def set_normalisation(self, name, mean, std):
        getattr(self, f"{name}_centre")[:len(mean)] = mean
        getattr(self, f"{name}_scale")[:len(std)] = std

    def fit_normalisation(self, obs, chunks):
        """What the checkpoint does not know, from the demonstrations: mean and deviation, as pi0's
        own processor has them."""
        for name, values in (("state", obs["state"]), ("action", chunks.flatten(0, 1))):
            if name not in self.known:
                self.set_normalisation(name, values.mean(0), values.std(0))

    @property
    def half_range(self):
        """Of each action dim, if it is normal: from its mean to the 99 % quantile (`credited`)."""
        return 2.33 * self.action_scale

    def normalise(self, actions):
        """(B, H, A_env) -> flow units (B, H, A)."""
        actions = actions.to(self.action_scale.device)
        actions = nn.functional.pad(actions, (0, self.action_dim - actions.shape[-1]))
        return (actions - self.action_centre) / (self.action_scale + 1e-6)

    def denormalise(self, x_0):
        """(B, H, A) -> (B, H, A_env), within the [-1, 1] that robots here take."""
        actions = x_0 * (self.action_scale + 1e-6) + self.action_centre
        return actions[..., :self.config["action_dim"]].clamp(-1, 1)

    def encode(self, obs):
        """rgb (B, cameras, 3, h, w) uint8, tokens (B, L) uint8, state (B, S) -> ctx: for each
        micro-batch its state, which tokens there are, and every layer's keys and values of them."""
        parts = torch.arange(len(obs["state"])).split(self.micro_batch)
        device = self.action_scale.device
        inputs = {name: obs[name].to(device) for name in ("rgb", "tokens", "state") if name in obs}
        return [checkpoint(self.vlm_pass, {name: z[rows] for name, z in inputs.items()},
                           use_reentrant=False) for rows in parts]

    def vlm_pass(self, obs):
        """Images and sentence through the vision-language part -> (state (b, S), which of the N
        tokens are there (b, N), a key and a value (b, heads, N, width) of every layer)."""
        inputs = self.vlm_inputs(obs)
        seen = inputs["attention_mask"]                                              # (b, N)
        with torch.set_grad_enabled(self.config["train"] == "all" and torch.is_grad_enabled()):
            embedded = self.model.model.embed_prefix(**inputs)                       # (b, N, width)
            layers = self.model.model.vlm(
                inputs_embeds=embedded, attention_mask=seen, position_ids=seen.cumsum(-1) - 1,
                token_type_ids=torch.zeros_like(seen), use_cache=True).cache.layers
        return self.normalised_state(obs), seen, [(layer.keys, layer.values) for layer in layers]

    def velocity(self, x_t, t, ctx):
        """(B, H, A), times (B,) -> v (B, H, A). A gradient costs a second pass: of the first only
        the inputs are kept, so that the memory is that of one micro-batch."""
        parts = zip(x_t.split(self.micro_batch), t.split(self.micro_batch), *zip(*ctx))
        return torch.cat([checkpoint(self.expert_pass, *part, use_reentrant=False)
                          for part in parts])

    def expert_pass(self, x_t, t, state, seen, layers):
        """(b, H, A), (b,) and what `vlm_pass` gave, through the action expert -> v (b, H, A)."""
        from transformers import DynamicCache
        return self.model(state=state, noise=x_t, timestep=t, attention_mask=seen,
                          cache=DynamicCache(layers)).logits

    def normalised_state(self, obs):
        """(B, S) -> (B, what pi0 has room for), normalised, padded, cut at 5 as in 01."""
        state = nn.functional.pad(obs["state"], (0, len(self.state_scale) - obs["state"].shape[-1]))
        return ((state - self.state_centre) / (self.state_scale + 1e-6)).clamp(-5, 5)

    def vlm_inputs(self, obs):
        """rgb (B, cameras, 3, h, w), tokens (B, L) -> what the vision-language part reads:
        image tokens, then begin, sentence, newline. Images are black below or at the right."""
        cameras, vision = obs["rgb"].shape[1], self.model.config.vlm_config.vision_config
        images = obs["rgb"].flatten(0, 1).float() / 127.5 - 1                        # [-1, 1]
        factor = vision.image_size / max(images.shape[-2:])
        size = [round(factor * side) for side in images.shape[-2:]]
        images = nn.functional.interpolate(images, size=size, mode="bilinear",
                                           antialias=True, align_corners=False)
        below, beside = (vision.image_size - size for size in images.shape[-2:])
        images = nn.functional.pad(images, (0, beside, 0, below), value=-1)          # black
        texts = [""] * len(obs["state"])
        if "tokens" in obs:
            # an idle simulator shows zeros, and 128 bytes may end inside a letter
            texts = [bytes(row.tolist()).decode(errors="replace").strip(" \0")
                     for row in obs["tokens"].cpu()]
        image = [self.model.config.vlm_config.image_token_id]
        image = image * cameras * (vision.image_size // vision.patch_size) ** 2
        sentences = [image + [self.tokenizer.bos_token_id]
                     + self.tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
                     for text in texts]
        longest = max(map(len, sentences))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in sentences])
        seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sentences])
        dtype, device = next(self.model.model.vlm.parameters()).dtype, images.device
        return {"input_ids": ids.to(device), "attention_mask": seen.to(device),
                "pixel_values": images.unflatten(0, (-1, cameras)).to(dtype),
                "pixel_attention_mask": torch.ones(len(ids), cameras, dtype=bool, device=device)}

    def state_dict(self, *args, **kwargs):
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        content = super().state_dict(*args, **kwargs)
        return {name: value for name, value in content.items() if name not in frozen}

    def load_state_dict(self, content):
        missing, unexpected = super().load_state_dict(content, strict=False)
        if unexpected or set(missing) & set(self.state_dict()):
            raise SystemExit(f"this checkpoint is not one of the pi0 in {self.config['folder']}: "
                             "that must be the one that it was trained from")

    def __deepcopy__(self, memo):
        """A copy that shares what is frozen: `old` costs as much memory as what is trained."""
        memo.update({id(p): p for p in self.parameters() if not p.requires_grad})
        memo[id(self.tokenizer)] = self.tokenizer
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo)
                              for name, value in self.__dict__.items()})
        return twin
