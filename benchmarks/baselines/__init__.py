"""What zsl is compared with: the same job done in the plain way. None of it is part of zsl."""
