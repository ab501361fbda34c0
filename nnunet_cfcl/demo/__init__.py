"""`nnunet_cfcl demo`: the whole way from images to a picture, by the commands a user types."""
