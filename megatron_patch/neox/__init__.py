"""The plugin for GPT-NeoX: the MetaLA layer, its settings, and how both are hooked in."""


def register() -> None:
    """Makes the imported GPT-NeoX know MetaLA; see :mod:`megatron_patch.neox.registration`."""
    from megatron_patch.neox import registration

    registration.register()
