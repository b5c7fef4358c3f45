"""Datasets of pictures and clips to Cosmos3 latents, on one machine or a Ray cluster."""

from cosmos3_fast.bulk.damage import Damage, check
from cosmos3_fast.bulk.dataset import LatentDataset
from cosmos3_fast.bulk.job import encode
from cosmos3_fast.bulk.summary import Summary

__all__ = ["Damage", "LatentDataset", "Summary", "check", "encode"]
