"""Duohuo: accounts, sessions and money that stay up while a whole data center goes down."""
