"""Wire format: message schemas, framing and the tensor codec. No sockets, no clock."""
