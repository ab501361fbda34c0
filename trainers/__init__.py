"""The drop-in folder for nnU-Net's environment variable ``nnUNet_extTrainer``; part of the wheel as well."""
