package gateway

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"syscall"
	"time"
)

// descriptors divides the process's file descriptors. The gateway cannot work without
// those of the server side, while clients come in any number; so clients get what is left
// over.
type descriptors struct {
	limit   int // of the process; 0: there is none to consider
	server  int // connections to the server, -max-open
	status  int // connections to the status
	reserve int // the rest: listening sockets, files, what was open before, and what the pool wants free
}

const (
	ownDescriptors    = 12 + leavingClients // standard streams, listeners, pollers, the spare, a file that is read
	leavingClients    = 4                   // clients above MaxClients that are being told so under TLS
	statusClients     = 8                   // connections to the status page at once
	leastClients      = 1
	defaultMaxClients = 10_000
)

// share computes the shares. The pool closes idle connections when fewer than one
// descriptor in sixteen, or fewer than 10, are free; the reserve keeps that many free.
func (p *plan) share() descriptors {
	d := descriptors{limit: descriptorLimit(), server: p.MaxOpen}
	if p.StatusListen != "" {
		d.status = statusClients
	}
	inherited := max(0, descriptorsOpen()-ownDescriptors/2)
	d.reserve = ownDescriptors + max(10, d.limit/16) + min(inherited, d.limit/2)
	return d
}

// clients returns how many clients there is room for.
func (d descriptors) clients() int {
	if d.limit == 0 {
		return int(^uint(0) >> 1)
	}
	return d.limit - d.server - d.status - d.reserve
}

func (d descriptors) String() string {
	if d.limit == 0 {
		return "no limit is known"
	}
	s := fmt.Sprintf("of %d, %d are for the server, %d are kept back", d.limit, d.server, d.reserve)
	if d.status > 0 {
		s += fmt.Sprintf(", %d are for the status", d.status)
	}
	return s + fmt.Sprintf(", and %d left for clients", max(0, d.clients()))
}

// fit lowers the number of clients to what there is room for. If not even leastClients
// fit, it returns an error and the gateway does not start.
func (p *plan) fit() error {
	files := p.share()
	room := files.clients()
	if room < leastClients {
		return fmt.Errorf("the process may open %d files, which is too few for -max-open %d and %d more: raise the limit (ulimit -n), or lower -max-open",
			files.limit, p.MaxOpen, files.status+files.reserve+leastClients)
	}
	p.askClients = p.MaxClients
	p.MaxClients = min(p.MaxClients, room)
	return nil
}

// spare is one open descriptor, kept for the moment when no other is free. The gateway
// closes the spare, accepts a client in its place, tells the client that there is no
// room, and closes it. Otherwise the client would wait in the system's queue.
type spare struct{ file *os.File }

func (s *spare) keep() {
	if s.file == nil {
		s.file, _ = os.Open(os.DevNull)
	}
}

func (s *spare) release() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// outOfDescriptors reports whether err means that no descriptor is free.
func outOfDescriptors(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// turnAway accepts one client in place of the spare, and tells the client that there is
// no room. It reports whether there was a client.
func (g *Gateway) turnAway(s *spare) bool {
	if s.file == nil {
		return false
	}
	s.release()
	defer s.keep()
	if d, ok := g.listener.Listener.(interface{ SetDeadline(time.Time) error }); ok {
		d.SetDeadline(time.Now().Add(100 * time.Millisecond)) // the client may have left already
		defer func() {
			d.SetDeadline(time.Time{})
			g.listener.wakeIfStopped()
		}()
	}
	nc, err := g.listener.Accept()
	if err != nil {
		return false
	}
	g.sendAway(nc)
	return true
}

// sendAway tells a client that there are too many clients. Under TLS that takes a
// handshake; leavingClients at once have one second each for it.
func (g *Gateway) sendAway(nc net.Conn) {
	g.count.turnedAway.Add(1)
	g.notice(slog.LevelWarn, "full", "clients are turned away: as many as -max-clients, or the limit of open files, allows are here",
		"clients", g.MaxClientsNow())
	nc.SetDeadline(time.Now().Add(time.Second))
	switch {
	case g.framing.full == "":
	case !g.listen.tls:
		io.WriteString(nc, g.framing.full) // the socket's buffer is empty, so this write does not wait
	default:
		select {
		case g.leaving <- struct{}{}:
			g.serving.Go(func() {
				defer func() { <-g.leaving }()
				defer nc.Close()
				tc := tls.Server(nc, g.certs.forClients.Load())
				if tc.HandshakeContext(g.ctx) == nil {
					io.WriteString(tc, g.framing.full)
					tc.CloseWrite()
				}
			})
			return
		default:
		}
	}
	nc.Close()
}
