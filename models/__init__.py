"""The published networks. `samdetr.models.build.build_model` makes one."""
