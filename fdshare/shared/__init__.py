"""Memory that all who hold it see; what lies in it travels by reference."""
