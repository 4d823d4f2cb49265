package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/mdlayher/vsock"

	"github.com/seed-ecb488c9/connpool"
)

// vsockAddr is the address of a virtual machine's port. A port of vsock has 32 bits, and Addr.Port
// has 16, so both numbers are in Addr.Host; the text is vsock://[3:1024].
func vsockAddr(contextID, port uint32) connpool.Addr {
	return connpool.Addr{Transport: "vsock", Host: fmt.Sprintf("%d:%d", contextID, port)}
}

// dialVsock is a dialer for Config.Dialers["vsock"]. The connection shows its socket: the pool
// hears hang-ups and looks for unread bytes as with TCP.
func dialVsock(ctx context.Context, addr connpool.Addr) (net.Conn, error) {
	if addr.QoS != (connpool.QoS{}) {
		return nil, fmt.Errorf("vsock: there is no quality of service (%w)", errors.ErrUnsupported)
	}
	cid, port, _ := strings.Cut(addr.Host, ":")
	c, err := strconv.ParseUint(cid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("vsock: %q is no context id: write vsock://[3:1024]", cid)
	}
	n, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("vsock: %q is no port: write vsock://[3:1024]", port)
	}
	nc, err := vsock.DialContext(ctx, uint32(c), uint32(n), nil)
	if err != nil {
		return nil, err // not nc: a nil *vsock.Conn is no nil net.Conn
	}
	return nc, nil
}
