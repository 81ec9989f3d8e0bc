"""The other implementation to compare generation with: transformers, with the engine's weights and number format."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dejavu.errors import UsageError
from dejavu.model.spec import ModelSpec
from dejavu.request import Request

if TYPE_CHECKING:
    from dejavu.engine.setup import EngineSetup

Tokens = list[list[int]]
Generate = Callable[[list[Request]], Tokens]


def load_peer(setup: "EngineSetup", name: str) -> Generate | None:
    """Load the same weights into the other implementation, on the first GPU where the engine computes on GPUs."""
    if name == "none":
        return None
    import torch

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(setup.config.threads or len(os.sched_getaffinity(0)))
    model = load_model(setup)
    fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}  # a GenerationConfig would lose the None

    def generate(requests: list[Request]) -> Tokens:
        prompts = torch.tensor([request.prompt_token_ids for request in requests], device=model.device)
        length = {"max_new_tokens": requests[0].sampling.max_tokens}
        with torch.inference_mode():
            output = model.generate(prompts, attention_mask=torch.ones_like(prompts), **fixed, **length)
        tokens: Tokens = output[:, prompts.shape[1] :].tolist()  # waits for a GPU
        return tokens

    return generate


def load_model(setup: "EngineSetup") -> Any:
    """Load the checkpoint, or make the engine's random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype, device = getattr(torch, setup.dtype), torch.device("cuda:0" if setup.on_cuda else "cpu")
    if setup.directory is not None:
        return AutoModelForCausalLM.from_pretrained(setup.directory, dtype=dtype).to(device).eval()
    return dummy_model(setup.spec, dtype, device)


def dummy_model(spec: ModelSpec, dtype: Any, device: Any) -> Any:
    """Make a model of a shape, with the numbers that `--load-format dummy` gives the engine."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dejavu.model.dummy import fill_piece
    from dejavu.model.parameters import LM_HEAD, NAMES, Piece

    model_type, values = peer_config(spec)
    config = AutoConfig.for_model(model_type, **values, tie_word_embeddings=spec.tied_embeddings)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.tie_weights()
    prefix = NAMES[spec.family].prefixes[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith(".weight"):
                parameter.fill_(1.0)  # the scale of a normalisation
                continue
            shape = tuple(parameter.shape)
            own_name = name if name == LM_HEAD else name.removeprefix(prefix)
            fill_piece(Piece(own_name, shape, tuple((0, size) for size in shape)), parameter.data)
    return model


def peer_config(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """Give transformers' model type and configuration of a shape; UsageError for those that are not written down."""
    if spec.family == "opt":
        return "opt", {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "ffn_dim": spec.ffn_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "max_position_embeddings": spec.max_positions,
            "word_embed_proj_dim": spec.embedding_size or spec.hidden_size,
            "do_layer_norm_before": spec.norm_first,
        }
    if spec.family == "llama" and spec.rope_scaling is None:
        return "llama", {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.ffn_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "max_position_embeddings": spec.max_positions,
            "rms_norm_eps": spec.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        }
    raise UsageError(f"the peer has no random weights for {spec.family} models: give a checkpoint, or leave out --peer")
