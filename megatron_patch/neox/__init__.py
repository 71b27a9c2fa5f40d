"""The GPT-NeoX adapter: the MetaLA layer, its settings, and their registration in GPT-NeoX."""


def register() -> None:
    """Makes the imported GPT-NeoX know MetaLA; see :mod:`megatron_patch.neox.registration`."""
    from megatron_patch.neox import registration

    registration.register()
