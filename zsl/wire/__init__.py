"""What crosses the network: message schemas, framing and the tensor codec. No sockets, no clock."""
