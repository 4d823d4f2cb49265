// As in godebug_go125.go, from Go 1.26: TLS offers the hybrid key exchanges over the
// NIST curves.

//go:build go1.26

//go:debug tlssecpmlkem=1

package main
