"""Puts agents onto boards: cards, images, over SSH, and on this machine."""
