package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"

	"github.com/seed-ecb488c9/connpool"
)

// A probe is a kind of request that a measurement repeats. begin logs in, or sends a
// greeting, on a new connection.
type probe struct {
	name  string
	begin func(ctx context.Context, addr connpool.Addr, nc net.Conn) (session, error)

	// blind: any bytes count as the reply, so that the peer must be watched for bytes
	// that it sends unasked.
	blind bool

	// marked: each message of the peer has a type, so that no watch is needed.
	marked bool

	// alpn is the protocol name for a TLS handshake. "": none is sent.
	alpn string
}

// session is a probe's side of one connection: the state that Setup returns.
type session interface {
	// exchange sends one request and reads the whole reply. more is false if the peer
	// announced that it closes the connection now.
	exchange() (more bool, err error)

	// Buffered is the number of bytes read beyond the reply. The pool calls it.
	Buffered() int
}

const probeTeaching = `probes: what is asked again and again
  line                  a line, answered by a line; line:TEXT sends TEXT (echo,
                        and most text protocols)
  redis                 PING, after AUTH if REDISCLI_AUTH holds a password
  http                  GET / with keep-alive; http:/path for another page. A
                        status of 400 or more counts as an error, and 1xx is
                        no answer yet
  postgres              log-in, then "SELECT 1"; postgres:SQL for another query.
                        PGUSER, PGDATABASE and PGPASSWORD as with psql; trust,
                        clear text, MD5 and SCRAM-SHA-256 are spoken, Kerberos
                        and the like are not. TLS: a tls:// address, for servers
                        that take TLS without being asked (PostgreSQL 17)
  hex:BYTES,len=N       BYTES in hex; the answer is N bytes long
  hex:BYTES,until=BYTES the answer ends with these bytes
A server that speaks before it is asked, as mail servers do, is refused: its
greeting would be taken for an answer.
`

// parseProbe reads the value of -probe.
func parseProbe(text string) (probe, error) {
	kind, rest, given := strings.Cut(text, ":")
	p := probe{name: text}
	switch kind {
	case "line":
		if !given {
			rest = "ping"
		}
		if strings.ContainsAny(rest, "\r\n") {
			return p, errors.New("-probe line: the text must be one line")
		}
		p.begin, p.blind = bytesProbe([]byte(rest+"\n"), 0, []byte("\n")), true
	case "redis":
		if given {
			return p, errors.New("-probe redis takes no text: it sends PING")
		}
		p.begin = beginRedis
	case "http":
		if !given {
			rest = "/"
		}
		if !strings.HasPrefix(rest, "/") || strings.ContainsAny(rest, " \r\n") {
			return p, fmt.Errorf("-probe %s: the path must begin with a slash and have no spaces, such as http:/health", text)
		}
		p.begin = httpProbe(rest)
	case "postgres":
		if !given {
			rest = "SELECT 1"
		}
		if strings.TrimSpace(rest) == "" || strings.Contains(rest, "\x00") {
			return p, errors.New("-probe postgres: the query is empty; leave the colon out for SELECT 1")
		}
		p.begin, p.marked, p.alpn = postgresProbe(rest), true, "postgresql"
	case "hex":
		return parseHexProbe(p, rest)
	default:
		return p, fmt.Errorf("-probe %q is not known; there is line, redis, http, postgres and hex:BYTES,len=N or hex:BYTES,until=BYTES", text)
	}
	return p, nil
}

func parseHexProbe(p probe, text string) (probe, error) {
	const form = "it must look like hex:0102,len=8 or hex:0102,until=0d0a"
	ask, end, _ := strings.Cut(text, ",")
	request, err := hex.DecodeString(ask)
	if err != nil || len(request) == 0 {
		return p, fmt.Errorf("-probe hex: %q are no bytes in hex: %s", ask, form)
	}
	p.blind = true
	how, value, _ := strings.Cut(end, "=")
	switch how {
	case "len":
		n, err := strconv.Atoi(value)
		if err != nil || n < 1 || n > maxAnswer {
			return p, fmt.Errorf("-probe hex: the length %q is not a number from 1 to %d: %s", value, maxAnswer, form)
		}
		p.begin = bytesProbe(request, n, nil)
	case "until":
		delim, err := hex.DecodeString(value)
		if err != nil || len(delim) == 0 {
			return p, fmt.Errorf("-probe hex: %q are no bytes in hex: %s", value, form)
		}
		p.begin = bytesProbe(request, 0, delim)
	default:
		return p, fmt.Errorf("-probe hex: the end of the answer is missing: %s", form)
	}
	return p, nil
}

// maxAnswer bounds the bytes read for one reply, so that a wrong probe fails instead of
// filling the memory.
const maxAnswer = 16 << 20

// probeError means that the peer answered, but not as the probe expects.
type probeError struct{ text string }

func (e *probeError) Error() string { return e.text }

func unexpected(format string, args ...any) error { return &probeError{fmt.Sprintf(format, args...)} }

// bytesSession sends the same bytes each time. The reply has n bytes, or ends with until.
type bytesSession struct {
	*wire
	request []byte
	n       int
	until   []byte
}

func bytesProbe(request []byte, n int, until []byte) func(context.Context, connpool.Addr, net.Conn) (session, error) {
	return func(_ context.Context, _ connpool.Addr, nc net.Conn) (session, error) {
		return &bytesSession{newWire(nc), request, n, until}, nil
	}
}

func (s *bytesSession) exchange() (bool, error) {
	if err := s.ask(s.request); err != nil {
		return false, err
	}
	if s.until == nil {
		for left := s.n; left > 0; {
			k, err := s.Discard(min(left, 4096))
			if err != nil {
				return false, s.lastWords(err)
			}
			left -= k
		}
		return true, nil
	}
	last := s.until[len(s.until)-1]
	var tail []byte // the last bytes read, if the delimiter is longer than one
	for read := 0; read < maxAnswer; {
		piece, err := s.ReadSlice(last)
		read += len(piece)
		switch {
		case err == bufio.ErrBufferFull:
		case err != nil:
			return false, s.lastWords(err)
		case len(s.until) == 1:
			return true, nil
		}
		tail = append(tail, piece...)
		if err == nil && bytes.HasSuffix(tail, s.until) {
			return true, nil
		}
		tail = append(tail[:0], tail[max(0, len(tail)-len(s.until)):]...)
	}
	return false, unexpected("%d bytes came, and not %x", maxAnswer, s.until)
}

// answersIn returns how many whole replies b holds.
func (s *bytesSession) answersIn(b []byte) int {
	if s.until == nil {
		return len(b) / s.n
	}
	return bytes.Count(b, s.until)
}

// --- Redis ---

type redisSession struct{ *wire }

func beginRedis(_ context.Context, _ connpool.Addr, nc net.Conn) (session, error) {
	s := &redisSession{newWire(nc)}
	if password := os.Getenv("REDISCLI_AUTH"); password != "" {
		if err := s.command(fmt.Sprintf("*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n", len(password), password), "+OK"); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *redisSession) command(command, want string) error {
	if err := s.unasked(); err != nil {
		return err
	}
	if err := s.ask([]byte(command)); err != nil {
		return err
	}
	line, err := s.ReadSlice('\n')
	if err != nil {
		return s.lastWords(err)
	}
	if got := bytes.TrimRight(line, "\r\n"); string(got) != want {
		advice := ""
		if bytes.HasPrefix(got, []byte("-NOAUTH")) {
			advice = " (put the password into REDISCLI_AUTH)"
		}
		return unexpected("the server answers %q where %q is due%s", shortened(got), want, advice)
	}
	return nil
}

func (s *redisSession) exchange() (bool, error) {
	return true, s.command("*1\r\n$4\r\nPING\r\n", "+PONG")
}

// shortened returns the beginning of a peer's bytes, for an error.
func shortened(b []byte) []byte { return b[:min(len(b), 80)] }

// --- HTTP ---

type httpSession struct {
	*wire
	request []byte
}

func httpProbe(path string) func(context.Context, connpool.Addr, net.Conn) (session, error) {
	return func(_ context.Context, addr connpool.Addr, nc net.Conn) (session, error) {
		request := "GET " + path + " HTTP/1.1\r\nHost: " + httpHost(addr) + "\r\nUser-Agent: connpool\r\n\r\n"
		return &httpSession{newWire(nc), []byte(request)}, nil
	}
}

// httpHost is the Host header for addr: without a zone, which means nothing to the peer,
// and without a port only if the port is that of the scheme.
func httpHost(addr connpool.Addr) string {
	host := addr.ServerName
	if host == "" {
		host, _, _ = strings.Cut(addr.Host, "%")
	}
	own := uint16(80)
	switch {
	case addr.Transport == connpool.Unix:
		return "localhost"
	case addr.Transport == connpool.TLS:
		own = 443
	}
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if addr.Port != own {
		host += ":" + strconv.Itoa(int(addr.Port))
	}
	return host
}

// maxInterim is how many informational responses may precede the final one.
const maxInterim = 16

func (s *httpSession) exchange() (bool, error) {
	if err := s.unasked(); err != nil {
		return false, err
	}
	if err := s.ask(s.request); err != nil {
		return false, err
	}
	resp, err := s.final()
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer)); err != nil {
		return false, s.lastWords(err)
	} else if n == maxAnswer {
		return false, unexpected("the page is larger than %d bytes; choose a smaller one", maxAnswer)
	}
	switch {
	case resp.StatusCode >= 400:
		return false, unexpected("the server answers with an error page: %s", resp.Status)
	case resp.StatusCode < 200:
		return false, unexpected("the server answers %s, which was not asked for", resp.Status)
	}
	return !resp.Close, nil
}

// final skips informational responses, which are not final (RFC 9110, 15.2). 101
// Switching Protocols is final.
func (s *httpSession) final() (*http.Response, error) {
	for range maxInterim {
		resp, err := http.ReadResponse(s.Reader, nil)
		if err != nil {
			return nil, s.lastWords(err)
		}
		if resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols {
			return resp, nil
		}
		resp.Body.Close()
	}
	return nil, unexpected("%d informational answers came, and no final one", maxInterim)
}
