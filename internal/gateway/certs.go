package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// ServerFiles are the PEM files of a tls listener.
type ServerFiles struct {
	Cert, Key string
	ClientCA  string // "": clients need no certificate
}

// UpstreamFiles are the PEM files for a tls server.
type UpstreamFiles struct {
	CA         string // "": the system's roots
	ServerName string // "": the host of -to
	Cert, Key  string // "": no certificate of our own
}

func (f ServerFiles) fits(isTLS bool) (errs []error) {
	switch {
	case isTLS && (f.Cert == "" || f.Key == ""):
		errs = append(errs, fmt.Errorf("-listen is tls://: it needs -cert and -key"))
	case !isTLS && f != (ServerFiles{}):
		errs = append(errs, fmt.Errorf("-cert, -key and -client-ca are for a -listen that begins with tls://"))
	}
	return errs
}

func (f UpstreamFiles) fits(to *connpool.Addr) (errs []error) {
	if to.Transport != connpool.TLS {
		if f != (UpstreamFiles{}) {
			errs = append(errs, fmt.Errorf("-ca, -server-name, -upstream-cert and -upstream-key are for a -to that begins with tls://"))
		}
		return errs
	}
	if (f.Cert == "") != (f.Key == "") {
		errs = append(errs, fmt.Errorf("-upstream-cert and -upstream-key go together"))
	}
	if f.ServerName != "" {
		if to.ServerName != "" && to.ServerName != f.ServerName {
			errs = append(errs, fmt.Errorf("-server-name is %q and that of -to is %q: give one", f.ServerName, to.ServerName))
		}
		to.ServerName = f.ServerName
		if err := to.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("-server-name: %w", err))
		}
	}
	return errs
}

// certificates holds what was last read from the files, and replaces it when the files
// change. Existing connections keep the certificates they were made with.
type certificates struct {
	server   ServerFiles
	upstream UpstreamFiles
	alpn     []string // protocol names, for both sides

	forClients atomic.Pointer[tls.Config] // nil: the listener is not tls
	forServer  atomic.Pointer[tls.Config]

	mu      sync.Mutex // guards seen and reading; no file is read under it
	seen    [][]byte   // the contents in use
	reading *reading   // the read under way; nil: none
}

// reading is one read of all of the files. It has a goroutine of its own, because opening
// a file may take any time: a FIFO without a writer, or a file server that is down, may
// never answer. At most one reading is under way.
type reading struct {
	began    time.Time
	at       atomic.Pointer[string] // the flag and file being read
	done     chan struct{}          // closed when the fields below are set
	contents [][]byte
	err      error
}

// readFor is how long a file may take to open before the waiting callers get an error.
const readFor = 5 * time.Second

// maxPEM bounds how much is read of a file that never ends.
const maxPEM = 4 << 20

func (c *certificates) read(r *reading) {
	defer close(r.done)
	for _, f := range [...]struct{ flag, name string }{
		{"cert", c.server.Cert}, {"key", c.server.Key}, {"client-ca", c.server.ClientCA},
		{"ca", c.upstream.CA}, {"upstream-cert", c.upstream.Cert}, {"upstream-key", c.upstream.Key},
	} {
		if f.name == "" {
			r.contents = append(r.contents, nil)
			continue
		}
		at := "-" + f.flag + " " + f.name
		r.at.Store(&at)
		b, err := readPEM(f.name)
		if err != nil {
			r.err = fmt.Errorf("-%s: %w", f.flag, err)
			return
		}
		r.contents = append(r.contents, b)
	}
}

func readPEM(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err == nil && len(b) > maxPEM {
		err = fmt.Errorf("%s has more than %d bytes: it is no file of certificates", name, maxPEM)
	}
	return b, err
}

// load reads the files and puts them into use if all of them are good, else none. It
// reports whether anything changed.
func (c *certificates) load() (changed bool, err error) { return c.loadWithin(context.Background()) }

// loadWithin is load, but waits for the files until ctx is done, and for readFor at most.
// A read that ends later is not put into use; the next call reads again.
func (c *certificates) loadWithin(ctx context.Context) (changed bool, err error) {
	late := time.NewTimer(readFor)
	defer late.Stop()
	for {
		c.mu.Lock()
		r, mine := c.reading, false
		if r == nil {
			r, mine = &reading{began: time.Now(), done: make(chan struct{})}, true
			c.reading = r
			go c.read(r)
		}
		c.mu.Unlock()
		var stuck error
		select {
		case <-r.done:
		case <-late.C:
			at := "a file"
			if p := r.at.Load(); p != nil {
				at = *p
			}
			stuck = fmt.Errorf("%s does not open, or cannot be read to its end, since %v", at, time.Since(r.began).Round(time.Second))
		case <-ctx.Done():
			stuck = ctx.Err()
		}
		if stuck != nil {
			return false, stuck
		}
		c.mu.Lock()
		if c.reading == r {
			c.reading = nil
		}
		if mine {
			changed, err = c.applyLocked(r)
		}
		c.mu.Unlock()
		if mine { // else the read began before this call, and may have missed a change
			return changed, err
		}
	}
}

func (c *certificates) applyLocked(r *reading) (changed bool, err error) {
	if r.err != nil {
		return false, r.err
	}
	contents := r.contents
	cert, key, clientCA, ca, ourCert, ourKey := contents[0], contents[1], contents[2], contents[3], contents[4], contents[5]
	changed = c.seen == nil
	for i := range c.seen {
		changed = changed || !bytes.Equal(c.seen[i], contents[i])
	}
	if !changed {
		return false, nil
	}
	var forClients, forServer *tls.Config
	if cert != nil {
		forClients = &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: c.alpn}
		if forClients.Certificates, err = keyPair("-cert and -key", cert, key); err != nil {
			return false, err
		}
		if clientCA != nil {
			if forClients.ClientCAs, err = roots("-client-ca", clientCA); err != nil {
				return false, err
			}
			forClients.ClientAuth = tls.RequireAndVerifyClientCert
		}
		// Each tls.Config has its own keys for session tickets, so a session from before
		// a change cannot be resumed after it. crypto/tls changes the keys every day and
		// drops them after a week.
	}
	forServer = &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: c.alpn}
	if ca != nil {
		if forServer.RootCAs, err = roots("-ca", ca); err != nil {
			return false, err
		}
	}
	if ourCert != nil {
		if forServer.Certificates, err = keyPair("-upstream-cert and -upstream-key", ourCert, ourKey); err != nil {
			return false, err
		}
	}
	c.forClients.Store(forClients)
	c.forServer.Store(forServer)
	c.seen = contents
	return true, nil
}

func keyPair(flags string, cert, key []byte) ([]tls.Certificate, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flags, err)
	}
	return []tls.Certificate{pair}, nil
}

func roots(flag string, pem []byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: there is no PEM certificate in the file", flag)
	}
	return pool, nil
}

// tellInvalid logs, once a minute, that a certificate in use is expired or not yet valid.
// Otherwise the log would show only failing handshakes, without their cause.
func (g *Gateway) tellInvalid() {
	lines, invalid := g.Certificates()
	if invalid {
		g.notice(slog.LevelError, "invalid", "a certificate is not valid now: replace its file", "certificates", strings.Join(lines, "; "))
	}
}

// Certificates describes the certificates in use, with their expiry, and reports whether
// one has expired or is not valid yet.
func (g *Gateway) Certificates() (lines []string, invalid bool) {
	describe := func(flag string, cfg *tls.Config) {
		if cfg == nil {
			return
		}
		for _, c := range cfg.Certificates {
			if c.Leaf == nil {
				continue
			}
			left := time.Until(c.Leaf.NotAfter)
			state := fmt.Sprintf("valid until %s", c.Leaf.NotAfter.UTC().Format(time.DateOnly))
			switch {
			case time.Now().Before(c.Leaf.NotBefore):
				invalid = true
				state = fmt.Sprintf("NOT VALID before %s", c.Leaf.NotBefore.UTC().Format(time.DateTime))
			case left <= 0:
				invalid = true
				state = fmt.Sprintf("EXPIRED on %s", c.Leaf.NotAfter.UTC().Format(time.DateOnly))
			}
			lines = append(lines, fmt.Sprintf("%s: %s, %s", flag, strings.Join(append(c.Leaf.DNSNames, c.Leaf.Subject.CommonName), ", "), state))
		}
	}
	describe("-cert", g.certs.forClients.Load())
	describe("-upstream-cert", g.certs.forServer.Load())
	return lines, invalid
}
