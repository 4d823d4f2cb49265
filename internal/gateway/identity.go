package gateway

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
	"sync"

	"github.com/seed-ecb488c9/connpool"
)

// identity is what a Redis client has said about itself: user, password, database, name.
// Clients share connections only with clients of an equal identity. Each new connection
// sends the server the commands of its clients' identity.
type identity struct {
	resp3      bool
	auth       bool
	user, pass string // user "": the client gave the password alone
	db         int
	name       string
}

// identityKey is the ctx key for the *identity of a borrower. The Setup of a connection
// opened for that borrower reads it.
type identityKey struct{}

// scopeKey keys the hash in this process's scopes. Logs and status show scopes, so a
// scope must not reveal the credentials, nor allow guessing passwords offline.
var scopeKey = func() (key [32]byte) {
	rand.Read(key[:])
	return key
}()

// scope returns the Addr.Scope of the identity's connections: the parts that may be
// shown, and a keyed hash of the rest. The scope of a client that has said nothing is "".
func (id *identity) scope() string {
	if *id == (identity{}) {
		return ""
	}
	s := "db" + strconv.Itoa(id.db)
	if id.resp3 {
		s += ",resp3"
	}
	if id.auth || id.name != "" {
		mac := hmac.New(sha256.New, scopeKey[:])
		for _, part := range []string{strconv.FormatBool(id.auth), id.user, id.pass, id.name} {
			var size [8]byte
			binary.BigEndian.PutUint64(size[:], uint64(len(part)))
			mac.Write(size[:])
			io.WriteString(mac, part)
		}
		s += "," + hex.EncodeToString(mac.Sum(nil)[:16])
	}
	return s
}

// serverSaid is an error reply of the server to a login or similar command. The client
// gets the server's words.
type serverSaid struct{ line string }

func (e *serverSaid) Error() string { return "the server said: " + e.line }

// assume logs a connection in as the identity.
func (id *identity) assume(nc io.ReadWriter, u *replies) error {
	tell := func(args ...string) error {
		parts := make([][]byte, len(args))
		for i, a := range args {
			parts[i] = []byte(a)
		}
		if _, err := nc.Write(appendCommand(nil, parts...)); err != nil {
			return err
		}
		var reply store
		if err := u.reply(nc, &reply); err != nil {
			return err
		}
		if isError(reply.b) {
			return &serverSaid{string(reply.b)}
		}
		return nil
	}
	user := id.user
	if user == "" {
		user = "default"
	}
	switch {
	case id.resp3 && id.auth:
		if err := tell("HELLO", "3", "AUTH", user, id.pass); err != nil {
			return err
		}
	case id.resp3:
		if err := tell("HELLO", "3"); err != nil {
			return err
		}
	case id.auth && id.user == "": // the form for servers older than Redis users
		if err := tell("AUTH", id.pass); err != nil {
			return err
		}
	case id.auth:
		if err := tell("AUTH", id.user, id.pass); err != nil {
			return err
		}
	}
	if id.db != 0 {
		if err := tell("SELECT", strconv.Itoa(id.db)); err != nil {
			return err
		}
	}
	if id.name != "" {
		return tell("CLIENT", "SETNAME", id.name)
	}
	return nil
}

// claim returns the identity that a command asks for. If the gateway does not understand
// the command, it does not pass the command on, since the server might understand it;
// reply is then the error for the client.
func (id identity) claim(v verb, args [][]byte) (claimed identity, reply string) {
	syntax := func(what string) (identity, string) { return id, "-ERR " + what + "\r\n" }
	switch v {
	case vAuth:
		switch len(args) {
		case 1:
			id.auth, id.user, id.pass = true, "", string(args[0])
		case 2:
			id.auth, id.user, id.pass = true, string(args[0]), string(args[1])
			if id.user == "" {
				return syntax("gateway: the empty user name is not passed on")
			}
		default:
			return syntax("wrong number of arguments for 'auth' command")
		}
	case vSelect:
		if len(args) != 1 {
			return syntax("wrong number of arguments for 'select' command")
		}
		db, err := strconv.Atoi(string(args[0]))
		if err != nil || db < 0 || strconv.Itoa(db) != string(args[0]) {
			return syntax("invalid DB index")
		}
		id.db = db
	case vSetname:
		args = args[1:] // skips SETNAME itself
		if len(args) != 1 {
			return syntax("wrong number of arguments for 'client|setname' command")
		}
		if !isClientName(args[0]) {
			return syntax("Client names cannot contain spaces, newlines or special characters.")
		}
		id.name = string(args[0])
	case vHello:
		if len(args) == 0 {
			return id, ""
		}
		switch string(args[0]) {
		case "2":
			id.resp3 = false
		case "3":
			id.resp3 = true
		default:
			return id, "-NOPROTO unsupported protocol version\r\n"
		}
		for args = args[1:]; len(args) > 0; {
			switch {
			case is(args[0], "AUTH") && len(args) >= 3 && len(args[1]) > 0:
				id.auth, id.user, id.pass = true, string(args[1]), string(args[2])
				args = args[3:]
			case is(args[0], "SETNAME") && len(args) >= 2 && isClientName(args[1]):
				id.name = string(args[1])
				args = args[2:]
			default:
				return syntax("syntax error in HELLO")
			}
		}
	}
	return id, ""
}

func isClientName(b []byte) bool {
	for _, c := range b {
		if c < '!' || c > '~' {
			return false
		}
	}
	return len(b) <= 1024
}

// known remembers the scopes that a server has accepted. A claim with an unknown scope is
// tried under loginScope first, so that a refused claim leaves no address in the pool.
type known struct {
	mu     sync.Mutex // guards scopes; nothing else happens under it
	scopes map[string]bool
}

const maxKnown = 4096

func (k *known) has(scope string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.scopes[scope]
}

func (k *known) add(scope string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.scopes) >= maxKnown {
		clear(k.scopes)
	}
	if k.scopes == nil {
		k.scopes = make(map[string]bool)
	}
	k.scopes[scope] = true
}

func (k *known) remove(scope string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.scopes, scope)
}

// loginScope is the Scope of connections on which a claim is tried. Each serves one loan
// and is then closed, and its login is sent within that loan rather than in Setup: of two
// borrowers that wait for connections of one scope, each may get the other's.
const loginScope = "login"

// identify carries out a command that changes the client's identity, if the server
// agrees.
func (cl *client) identify(frame []byte, v verb) error {
	g, r := cl.g, &cl.resp
	claimed, answer := r.id.claim(v, words(frame))
	if answer != "" {
		cl.out.b = append(cl.out.b, answer...)
		return cl.flush()
	}
	scope := claimed.scope()
	mark := len(cl.out.b)
	if scope == "" || g.known.has(scope) {
		ctx, addr := g.under(&claimed)
		cl.batch = append(cl.batch[:0], frame)
		if err := cl.ask(ctx, addr, frame); err != nil {
			return err
		}
	} else if err := cl.login(frame); err != nil {
		return err
	}
	switch reply := cl.out.b[mark:]; {
	case !isError(reply):
		g.known.add(scope)
		cl.become(claimed)
	case hasPrefix(reply, "-ERR gateway:"): // the server may have carried it out, on a connection that is not the client's
		cl.out.b = append(cl.out.b[:len(cl.out.b)-2], "; the client's identity is unchanged\r\n"...)
	case scope != "": // the server no longer accepts what it accepted before
		g.known.remove(scope)
		_, addr := g.under(&claimed)
		g.pool.Retire(addr)
	}
	return cl.flush()
}

// under returns the ctx and the address for connections of an identity.
func (g *Gateway) under(id *identity) (context.Context, connpool.Addr) {
	addr := g.to
	addr.Scope = id.scope()
	return context.WithValue(g.ctx, identityKey{}, id), addr
}

// become makes id the client's identity from now on.
func (cl *client) become(id identity) {
	cl.resp.id = id
	cl.resp.ctx, cl.resp.addr = cl.g.under(&id)
}

// login tries a command on a connection with the client's current identity. The
// connection is closed afterwards.
func (cl *client) login(frame []byte) error {
	g := cl.g
	ctx, cancel := context.WithTimeout(g.ctx, g.RequestTimeout)
	defer cancel()
	g.count.requests.Add(1)
	g.count.replies.Add(1)
	addr := g.to
	addr.Scope = loginScope
	watch := cl.watchOver(false, cancel)
	defer watch.stop()
	ran := false
	err := g.pool.With(ctx, addr, func(c connpool.Conn) error {
		if watch.sendable() != nil {
			return errLeft
		}
		ran = true
		defer c.Close()
		u := connpool.State[*replies](c)
		if err := cl.resp.id.assume(c, u); err != nil {
			return err
		}
		if _, err := c.Write(frame); err != nil {
			return err
		}
		return u.reply(c, &cl.out)
	})
	if watch.verdict() != nil && !ran {
		g.count.failures[left].Add(1)
		return errLeft
	}
	if err != nil {
		cl.out.b = cl.failed(cl.out.b, frame, err, ran)
	}
	return nil
}

func (id identity) String() string { return fmt.Sprintf("scope %q", id.scope()) } // never shows the password
