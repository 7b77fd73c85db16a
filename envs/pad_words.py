"""The things, pads and combinations that PutOnPad-v1's instructions name.

An instruction names one of six things and one of three pads. A thing is a number 0-5, 2 * colour +
shape, a pad 0-2, its colour. A slot counts both: things 0-5, pads 6-8.
"""

COLOURS = {"red": (0.9, 0.1, 0.1, 1), "green": (0.1, 0.7, 0.1, 1), "blue": (0.1, 0.2, 0.9, 1)}
SHAPES = "cube", "cylinder"
COMBINATIONS = [(thing, pad) for thing in range(6) for pad in range(3)]
# A Latin square: every colour, shape and pad, and every pair of two, is trained; a third is not.
HELD_OUT = [(thing, pad) for thing, pad in COMBINATIONS if (thing // 2 + thing % 2 + pad) % 3 == 0]
TRAINED = [c for c in COMBINATIONS if c not in HELD_OUT]
