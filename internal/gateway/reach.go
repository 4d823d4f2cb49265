package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// lookFor is how long Reach listens to a server that says nothing. A refusal of our
// certificate, or a hang-up of a proxy without a server behind it, comes sooner.
const lookFor = time.Second

// Reach opens a connection to the server and finds out whether the server would answer a
// request, or returns why not. An open connection alone proves little: a server that
// refuses our certificate says so only after the handshake of TLS 1.3; a proxy without a
// server behind it accepts and hangs up; a server that is full, or sends a greeting,
// speaks before it is asked.
func (g *Gateway) Reach(ctx context.Context) error {
	_, err := g.Examine(ctx)
	return err
}

// Examine is Reach, and also returns a remark: something the operator should know
// although requests are answered. "": nothing.
func (g *Gateway) Examine(ctx context.Context) (remark string, err error) {
	ctx, cancel := context.WithTimeout(ctx, g.DialTimeout+g.RequestTimeout)
	defer cancel()
	// A pool of its own, because the clients' pool judges a new connection in its Setup.
	pool, err := connpool.New(connpool.Config{MaxOpen: 1, DialTimeout: g.DialTimeout,
		TLSFor: func(connpool.Addr) (*tls.Config, error) { return g.certs.forServer.Load(), nil }})
	if err != nil {
		return "", err
	}
	defer pool.Close()
	lent := false
	err = pool.With(ctx, g.to, func(c connpool.Conn) error {
		lent = true
		defer c.Close() // closed, because Examine sends requests that no client sends
		said, err := listen(c, lookFor)
		switch {
		case len(said) > 0 && g.Framing == "session":
			if !g.Eager {
				remark = fmt.Sprintf("the server speaks first (%q): with -eager its clients hear it at once, without it only after they have spoken", said)
			}
			return nil
		case len(said) > 0:
			return fmt.Errorf("the server speaks first: it said %q before it was asked, which a client would take for the reply to its first request; "+
				"if it always does, use -framing session with -eager", said)
		case err != nil:
			return g.hangsUp(err)
		case g.Framing == "resp":
			return g.pings(c)
		case g.to.Transport != connpool.TLS && g.answersTLS(ctx, c):
			return errors.New("the server speaks TLS at this address: write tls:// in -to")
		}
		return nil
	})
	if err != nil && !lent { // the end may be noticed before the loan
		err = g.hangsUp(err)
	}
	return remark, err
}

// listen reads what comes unasked within d. A nil error means that nothing came.
func listen(c net.Conn, d time.Duration) (said []byte, err error) {
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		return nil, err
	}
	b := make([]byte, 80)
	n, err := c.Read(b)
	switch {
	case n > 0:
		return b[:n], nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = c.SetReadDeadline(time.Time{})
	}
	return nil, err
}

// hangsUp returns the meaning of a connection that ended without a byte from the server.
func (g *Gateway) hangsUp(err error) error {
	switch {
	case refusal(err) != "" && g.Upstream.Cert == "":
		return fmt.Errorf("the server refuses connections without a certificate (%w): give -upstream-cert and -upstream-key", err)
	case refusal(err) != "":
		return fmt.Errorf("the server refuses the certificate of -upstream-cert (%w)", err)
	case errors.Is(err, io.EOF), connpool.KindOf(err) == connpool.KindEOF, connpool.KindOf(err) == connpool.KindBroken:
		advice := "it is full, refuses this machine, or is a proxy without a server behind it"
		if g.to.Transport != connpool.TLS {
			advice += ", or speaks TLS at this address (tls:// in -to)"
		}
		if g.to.Transport == connpool.TLS && len(g.alpn) == 0 {
			advice += ", or wants to be told the protocol (-alpn)"
		}
		return fmt.Errorf("the server accepts connections and ends them at once (%w): %s", err, advice)
	}
	return err
}

// pings asks a Redis server whether it answers. A request for a password counts as an
// answer: clients have theirs.
func (g *Gateway) pings(c connpool.Conn) error {
	if err := c.SetDeadline(time.Now().Add(g.RequestTimeout)); err != nil {
		return err
	}
	u := &replies{sc: g.framing.newReplies(&g.Config), max: g.MaxFrame}
	var reply store
	_, err := c.Write(appendCommand(nil, []byte("PING")))
	if err == nil {
		err = u.next(c, &reply)
	}
	said := strings.TrimRight(string(reply.b[:min(80, len(reply.b))]), "\r\n")
	var bad *malformed
	switch {
	case errors.As(err, &bad), err == nil && u.Buffered() > 0:
		return fmt.Errorf("the server does not answer PING as Redis does (%v): is -framing resp right, or does it speak TLS at this address?", err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("the server does not answer PING within -request-timeout, %v", g.RequestTimeout)
	case err != nil:
		return g.hangsUp(err)
	case !isError(reply.b), hasPrefix(reply.b, "-NOAUTH"), hasPrefix(reply.b, "-NOPERM"):
		return nil
	}
	return fmt.Errorf("the server answers PING with %q", said)
}

// answersTLS reports whether the server at an address that is not tls:// speaks TLS. A
// TLS server waits silently for a TLS hello, as a plain server waits for a request; only
// a hello tells the two apart.
func (g *Gateway) answersTLS(ctx context.Context, c net.Conn) bool {
	ask := func(c net.Conn, question string, answer []byte) int {
		c.SetDeadline(time.Now().Add(lookFor))
		io.WriteString(c, question)
		n, _ := io.ReadFull(c, answer)
		return n
	}
	var a [7]byte // the header of a record and the first bytes of its body
	if n := ask(c, tlsHello, a[:]); n < len(a) || a[1] != 3 {
		return false
	}
	if a[0] != 21 && (a[0] != 22 || a[5] != 2) { // neither an alert nor a server's hello
		return false
	}
	if g.Framing != "session" {
		return true
	}
	// A PostgreSQL server may speak both at one address: it answers its own request for
	// TLS with one letter, and any other TLS server answers that request with an alert.
	network, address := "tcp", net.JoinHostPort(g.to.Host, strconv.Itoa(int(g.to.Port)))
	if g.to.Transport == connpool.Unix {
		network, address = "unix", g.to.Host
	}
	again, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return true
	}
	defer again.Close()
	n := ask(again, "\x00\x00\x00\x08\x04\xd2\x16\x2f", a[:])
	return n != 1 || a[0] != 'S' && a[0] != 'N'
}

// tlsHello is a TLS ClientHello. It offers so little that most servers answer with an
// alert, which is as good an answer as a handshake. It contains no line feed and no
// length that a framing would read as the length of a request.
const tlsHello = "\x16\x03\x01\x00\x45" + // header of a handshake record
	"\x01\x00\x00\x41\x03\x03" + // ClientHello, TLS 1.2
	"connpool looks who listens here." + // 32 bytes, random in a real hello
	"\x00" + // no session
	"\x00\x0c\xc0\x2b\xc0\x2f\xc0\x2c\xc0\x30\x00\x9c\x00\x2f" + // suites
	"\x01\x00" + // no compression
	"\x00\x0c\x00\x0d\x00\x08\x00\x06\x04\x03\x08\x04\x04\x01" // signature algorithms
