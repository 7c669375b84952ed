"""Real models of timm, torchvision and transformers under every way to the penalty's gradient; not a part of the tests.

``make zoo`` makes an environment of its own and runs `tests.zoo.measure`; the table is in docs/support.md.
"""
