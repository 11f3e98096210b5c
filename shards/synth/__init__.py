"""Procedural aerial towns: synthetic labelled scenes in the layout and palette of ISPRS Potsdam."""

from __future__ import annotations

from shards.synth.files import PALETTE, render, scene_id, write_scenes

__all__ = ["PALETTE", "render", "scene_id", "write_scenes"]
