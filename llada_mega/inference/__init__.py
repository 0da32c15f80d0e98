"""Block-diffusion decoding and loaded models."""

from llada_mega.inference.decoding import DecodingOptions, Generation, decode
from llada_mega.inference.loading import load_model
from llada_mega.inference.model import LoadedModel

__all__ = ["DecodingOptions", "Generation", "LoadedModel", "decode", "load_model"]
