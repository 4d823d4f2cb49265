// The module is for Go 1.24, whose defaults the command would have under every
// toolchain. It takes these from Go 1.25: a limit of a container on processors counts,
// also when it changes, and no SHA-1 signature is good enough for TLS 1.2.

//go:build go1.25

//go:debug containermaxprocs=1
//go:debug updatemaxprocs=1
//go:debug tlssha1=0

package main
